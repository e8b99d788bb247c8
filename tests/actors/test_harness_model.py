"""The model as lm-evaluation-harness sees it, against transformers and the harness's own rules."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from actors.generator_config import GeneratorConfig
from actors.measured_model import LocalModel
from llama2.chat import Message, encode_dialogue, encode_prompt
from llama2.prompting import Prompting
from tests.actors.endpoint import CONTEXT, model_folder

pytest.importorskip("lm_eval", reason="needs the extra eval")
from lm_eval.api.instance import Instance

from actors.harness_model import HarnessModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> HarnessModel:
    return HarnessModel(LocalModel(folder, "float32", GeneratorConfig()), Prompting.read(folder))


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def logprobs(folder: Path, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities behind each token but the last, by transformers."""
    reference = LlamaForCausalLM.from_pretrained(folder, local_files_only=True)
    with torch.no_grad():
        found: torch.Tensor = reference(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
    return found


def test_loglikelihood(model: HarnessModel, folder: Path) -> None:
    """Of the whole text's tokens, those behind the context's count, spaces at the context's end
    among them; without a context the text stands behind bos."""
    tokenizer = Prompting.read(folder).tokenizer
    cases = [("the cat", " sees the dog"), ("the cat ", "sees"), ("", "who is there"), ("a", " b")]
    found = model.loglikelihood(instances("loglikelihood", *cases))
    for (context, continuation), (value, greedy) in zip(cases, found, strict=True):
        whole = [tokenizer.bos_id, *tokenizer.encode(context + continuation)]
        start = 1 + len(tokenizer.encode(context.rstrip()))
        rows = logprobs(folder, whole)[start - 1 :]
        wanted = torch.tensor(whole[start:])
        assert value == pytest.approx(rows.gather(1, wanted[:, None]).sum().item(), abs=1e-3)
        assert greedy == bool((rows.argmax(-1) == wanted).all())


def test_rolling_loglikelihood_counts_each_token_once(model: HarnessModel, folder: Path) -> None:
    """A text of two and a half contexts: windows as wide as the context, the last one with as much
    context as fits."""
    text = "the cat dog sees hears green red house garden in and who is not there " * 10
    tokenizer = Prompting.read(folder).tokenizer
    tokens = tokenizer.encode(text)
    assert len(tokens) > 2 * CONTEXT
    (found,) = model.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)))
    total, done = 0.0, 0
    while done < len(tokens):
        end = min(done + CONTEXT, len(tokens))
        first = max(0, end - CONTEXT)
        window = [tokenizer.bos_id if first == 0 else tokens[first - 1], *tokens[first:end]]
        rows = logprobs(folder, window)
        for place in range(done, end):
            total += rows[place - first, tokens[place]].item()
        done = end
    assert found == pytest.approx(total, abs=5e-3)
    assert model.loglikelihood_rolling(instances("loglikelihood_rolling", ("",))) == [0.0]


def test_generate_until(model: HarnessModel, folder: Path) -> None:
    """Greedy unless sampling is asked for; up to the first string that ends the answer."""
    prompting = Prompting.read(folder)
    tokens = prompting.encode_text("the cat")
    reference = LlamaForCausalLM.from_pretrained(folder, local_files_only=True)
    with torch.no_grad():
        drawn = reference.generate(
            torch.tensor([tokens]), max_new_tokens=15, do_sample=False, pad_token_id=0,
            eos_token_id=list(prompting.stop_ids),
        )[0, len(tokens) :].tolist()  # fmt: skip
    kept = [token for token in drawn if token not in prompting.stop_ids]
    tokenizer = prompting.tokenizer
    whole = tokenizer.decode([*tokenizer.encode("x"), *kept])[1:]
    ends = whole[len(whole) // 2]
    settings: list[dict[str, Any]] = [
        {"until": [], "max_gen_toks": 15},
        {"until": [ends], "max_gen_toks": 15, "do_sample": False},
        {"until": ends, "max_gen_toks": 15, "temperature": 0.0},
    ]
    asked = instances("generate_until", *[("the cat", given) for given in settings])
    assert model.generate_until(asked) == [whole, *[whole.partition(ends)[0]] * 2]


def test_long_contexts_lose_their_beginning_and_are_counted(
    model: HarnessModel, folder: Path
) -> None:
    text = "the cat dog sees hears green red house " * 20
    before = model.shortened
    long, short = model.loglikelihood(instances("loglikelihood", (text, " cat"), ("a", " cat")))
    tokenizer = Prompting.read(folder).tokenizer
    whole = tokenizer.encode(text.rstrip() + "  cat")[-CONTEXT - 1 :]
    context = tokenizer.encode(text.rstrip())
    count = len(tokenizer.encode(text.rstrip() + "  cat")) - len(context)
    rows = logprobs(folder, whole)[-count:]
    wanted = torch.tensor(whole[-count:])
    assert long[0] == pytest.approx(rows.gather(1, wanted[:, None]).sum().item(), abs=1e-3)
    model.generate_until(instances("generate_until", (text, {"until": [], "max_gen_toks": 9})))
    assert model.shortened == before + 2
    assert short[0] < 0


def test_chats_are_the_tokens_of_training(model: HarnessModel, folder: Path) -> None:
    """Llama 2's format: a chat asked as a task gives the tokens that fine-tuning saw."""
    tokenizer = Prompting.read(folder).tokenizer
    turns = [("system", "the red house"), ("user", "who sees"), ("assistant", "the dog"),
             ("user", "is the cat there")]  # fmt: skip
    history = [{"role": role, "content": content} for role, content in turns]
    messages = [Message(role, content) for role, content in turns]  # type: ignore[arg-type]
    text = model.apply_chat_template(history)
    assert model.tok_encode(text.rstrip(" ")) == encode_prompt(tokenizer, messages)
    context, continuation = model._encode_pair(text, "the cat")
    trained = encode_dialogue(tokenizer, [*messages, Message("assistant", "the cat")]).tokens
    assert context == encode_prompt(tokenizer, messages)
    assert [*context, *continuation] == trained[: len(context) + len(continuation)]
    begun = model.apply_chat_template(
        [*history, {"role": "assistant", "content": "the"}], add_generation_prompt=False
    )
    assert begun == text + "the"
