"""A SentencePiece tokenizer as the files of a Hugging Face folder.

Transformers' `LlamaTokenizer` drops the prefix space before text that begins with a space, so the
folder names the general class instead, which follows `tokenizer.json` to the letter and encodes as
SentencePiece does.
"""

import json
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

SPACE = "▁"

CHAT_TEMPLATE = """\
{%- if messages[0].role == 'system' -%}
{%- set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' -%}
{%- set turns = messages[1:] -%}
{%- else -%}
{%- set system = '' -%}
{%- set turns = messages -%}
{%- endif -%}
{%- for turn in turns -%}
{%- if (turn.role == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('user and assistant messages must alternate') -}}
{%- endif -%}
{%- if turn.role == 'user' -%}
{{- bos_token + '[INST] ' + ((system if loop.first else '') + turn.content).strip() + ' [/INST]' -}}
{%- else -%}
{{- ' ' + turn.content.strip() + ' ' + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""


def hugging_face_files(processor: Any) -> dict[str, bytes]:
    """`tokenizer.model`, `tokenizer.json` and `tokenizer_config.json` of a `SentencePieceProcessor`
    with BPE.

    The configuration carries Llama 2's chat template, which agrees with `llama2.chat` token by
    token.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": processor.id_to_piece(processor.bos_id()),
        "eos_token": processor.id_to_piece(processor.eos_id()),
        "unk_token": processor.id_to_piece(processor.unk_id()),
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    return {
        "tokenizer.model": processor.serialized_model_proto(),
        "tokenizer.json": _fast_tokenizer(processor).to_str().encode(),
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
    }


def _fast_tokenizer(processor: Any) -> Tokenizer:
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    bos, unknown = pieces[processor.bos_id()], pieces[processor.unk_id()]
    fast = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=_merges(processor, vocabulary),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    control = [p for i, p in enumerate(pieces) if processor.is_control(i) or p == unknown]
    fast.add_special_tokens(
        [AddedToken(piece, normalized=False, special=True) for piece in control]
    )
    fast.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, processor.bos_id())],
    )
    return fast


def _merges(processor: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best score first: SentencePiece merges the
    best-scored result.
    """
    ranked = []
    for piece, i in vocabulary.items():
        if processor.is_byte(i) or processor.is_control(i) or processor.is_unknown(i):
            continue
        for cut in range(1, len(piece)):
            left, right = vocabulary.get(piece[:cut]), vocabulary.get(piece[cut:])
            if left is not None and right is not None:
                ranked.append((-processor.get_score(i), left, right, piece[:cut], piece[cut:]))
    return [(left, right) for *_, left, right in sorted(ranked)]
