"""LoRA against dense weights, against numbers worked out by hand, and against PEFT where it is
installed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from llama2.checkpoint import config_from_hf
from llama2.config import ModelConfig
from llama2.lora import (
    LoraConfig,
    LoraLinear,
    adapter_weights,
    apply_lora,
    load_adapter,
    merged_weights,
    save_adapter,
)
from llama2.model import ScalarModel, Transformer

CONFIG = ModelConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=88,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_bias=True,
    pad_token_id=0,
)
LORA = LoraConfig(rank=3, alpha=5.0, targets=("q_proj", "v_proj", "o_proj", "down_proj"))
UPDATED = "model.layers.1.self_attn.q_proj"


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Weights large enough to matter; so are the updates, whose B starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            centre, spread = (0.0, 0.15) if parameter.dim() > 1 else (1.0, 0.3)
            parameter.normal_(centre, spread, generator=generator)


def plain(kind: type[Transformer] | type[ScalarModel] = Transformer) -> Any:
    model = kind(CONFIG)
    randomize(model)
    return model


def adapted(kind: type[Transformer] | type[ScalarModel] = Transformer) -> Any:
    model = plain(kind)
    apply_lora(model, LORA, seed=1)
    randomize(model, seed=2)
    return model


def merged(model: nn.Module, config: LoraConfig = LORA) -> Any:
    dense = type(model)(CONFIG)
    dense.load_state_dict(dict(merged_weights(model.state_dict().items(), config)))
    return dense


def draw(*shape: int) -> Tensor:
    return torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(0))


def loss(model: nn.Module) -> Tensor:
    tokens = draw(2, 15)
    segments = torch.tensor([[1] * 6 + [2] * 9, [1] * 12 + [0] * 3])
    return -model(tokens, segments, targets_BT=tokens.roll(-1, dims=1)).mean()


def test_update_by_hand() -> None:
    """W = [1 2; 3 4; 5 6], B A = [1 0 -1]' [2 1], scale 6/1: W + 6 B A = [13 8; 3 4; -7 0]."""
    linear = nn.Linear(2, 3, bias=False)
    model = nn.ModuleDict({"q_proj": linear})
    config = LoraConfig(rank=1, alpha=6.0, targets=("q_proj",))
    apply_lora(model, config, seed=0)
    values = {
        "weight": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]],
        "lora_A": [[2.0, 1.0]],
        "lora_B": [[1.0], [0.0], [-1.0]],
    }
    model.load_state_dict({f"q_proj.{name}": torch.tensor(v) for name, v in values.items()})
    # [1 -1] on the left of the transposed sum: 13 - 8, 3 - 4, -7 - 0.
    assert model["q_proj"](torch.tensor([[1.0, -1.0]])).tolist() == [[5.0, -1.0, -7.0]]
    ((name, weight),) = merged_weights(model.state_dict().items(), config)
    assert name == "q_proj.weight"
    assert weight.tolist() == [[13.0, 8.0], [3.0, 4.0], [-7.0, 0.0]]


@torch.no_grad()
def test_output_is_unchanged_at_the_start() -> None:
    model, tokens = plain(), draw(2, 15)
    before = model(tokens)
    apply_lora(model, LORA, seed=1)
    assert isinstance(model.get_submodule(UPDATED), LoraLinear)
    assert torch.equal(model(tokens), before)


@torch.no_grad()
def test_merged_weights_compute_the_same() -> None:
    model, tokens = adapted(), draw(2, 15)
    dense = merged(model)
    torch.testing.assert_close(dense(tokens), model(tokens), atol=1e-4, rtol=1e-5)
    # The agreement would show nothing if the updates were small.
    state = model.state_dict()
    dense.load_state_dict({n: t for n, t in state.items() if n in dense.state_dict()})
    assert (dense(tokens) - model(tokens)).abs().max() > 0.1


def test_gradients_follow_from_those_of_dense_weights() -> None:
    """With dW the gradient by the dense weight: dA = scale B' dW and dB = scale dW A'."""
    model = adapted()
    dense = merged(model)
    loss(model).backward()
    loss(dense).backward()
    scale, checked = 5.0 / 3, 0
    for name, module in model.named_modules():
        if not isinstance(module, LoraLinear):
            continue
        whole = dense.get_submodule(name).weight.grad
        for found, expected in (
            (module.lora_A.grad, scale * module.lora_B.T @ whole),
            (module.lora_B.grad, scale * whole @ module.lora_A.T),
        ):
            assert expected.abs().max() > 1e-4
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
            checked += 1
    assert checked == 2 * 4 * CONFIG.num_hidden_layers


def test_only_updates_and_the_score_head_are_trained() -> None:
    model = plain(ScalarModel)
    apply_lora(model, LORA, seed=1)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # Rank 3: q 64 to 64, v 64 to 32, o 64 to 64, down 88 to 64, in two layers; a head of 64.
    assert sum(p.numel() for p in trained.values()) == 2 * 3 * (128 + 96 + 128 + 152) + 64
    assert set(trained) == set(dict(adapter_weights(model.named_parameters())))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    model(draw(2, 15)).sum().backward()
    optimizer.step()
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    # While B is zero, A has no gradient.
    assert changed == {name for name in trained if not name.endswith("lora_A")}


def test_updates_are_drawn_from_the_seed() -> None:
    def drawn(seed: int, width: int = 64) -> Tensor:
        model = nn.ModuleDict({"q_proj": nn.Linear(width, 8), "k_proj": nn.Linear(width, 8)})
        apply_lora(model, LoraConfig(rank=50, targets=("q_proj", "k_proj")), seed)
        assert not model["q_proj"].lora_B.any()
        return torch.stack((model["q_proj"].lora_A, model["k_proj"].lora_A)).detach()

    first = drawn(3)
    assert torch.equal(first, drawn(3))
    assert not torch.equal(first, drawn(4))
    assert not torch.equal(first[0], first[1])
    # Uniform within 1 / sqrt(100): standard deviation 0.1 / sqrt(3).
    wide = drawn(3, width=100)
    assert wide.abs().max() <= 0.1
    assert wide.std().item() == pytest.approx(0.0577, rel=0.02)


def test_dropout_is_of_the_update_alone_and_in_training_alone() -> None:
    linear = nn.Linear(4, 4, bias=False)
    model = nn.ModuleDict({"q_proj": linear})
    apply_lora(model, LoraConfig(rank=4, alpha=4.0, dropout=0.75, targets=("q_proj",)), seed=0)
    with torch.no_grad():
        for name in ("lora_A", "lora_B", "weight"):
            getattr(model["q_proj"], name).copy_(torch.eye(4))
    x = torch.ones(5000, 4)
    torch.manual_seed(0)
    output = model.train()["q_proj"](x)
    # 1 from the weight; from the update nothing, or once in four times 1 / (1 - 0.75).
    assert set(output.unique().tolist()) == {1.0, 5.0}
    assert output.mean().item() == pytest.approx(2.0, abs=0.05)
    assert bool((model.eval()["q_proj"](x) == 2.0).all())


def test_merging_is_rounded_once() -> None:
    """1.0234375 squared less 1 is 0.04742; were the product rounded before, 0.046875 would be
    left."""
    named = [
        ("q_proj.weight", torch.tensor([[-1.0]])),
        ("q_proj.lora_A", torch.tensor([[1.0234375]])),
        ("q_proj.lora_B", torch.tensor([[1.0234375]])),
    ]
    low = [(name, tensor.bfloat16()) for name, tensor in named]
    ((_, weight),) = merged_weights(low, LoraConfig(rank=1, alpha=1.0, targets=("q_proj",)))
    assert weight.dtype == torch.bfloat16
    assert weight.item() == 194 / 4096  # the nearest that bfloat16 has


def test_merging_keeps_names_and_order_and_lets_go_of_what_it_was_given() -> None:
    """A weight may be gone once the next one is asked for, as under ZeRO 3."""
    model = adapted()
    expected = merged(model).state_dict()

    def gathered() -> Any:
        for name, tensor in model.state_dict().items():
            lent = tensor.clone()
            yield name, lent
            lent.fill_(float("nan"))

    found = [(name, tensor.clone()) for name, tensor in merged_weights(gathered(), LORA)]
    assert [name for name, _ in found] == list(Transformer(CONFIG).state_dict())
    for name, tensor in found:
        torch.testing.assert_close(tensor, expected[name], atol=0, rtol=0)


@pytest.mark.parametrize("kind", [Transformer, ScalarModel])
@torch.no_grad()
def test_an_adapter_comes_back(kind: type[Transformer], tmp_path: Path) -> None:
    model, again, tokens = adapted(kind), plain(kind), draw(2, 15)
    again.load_state_dict(model.state_dict(), strict=False)
    save_adapter(model.state_dict().items(), LORA, tmp_path, "base")
    if kind is ScalarModel:
        again.score.weight.zero_()  # comes with the adapter
    config = load_adapter(again, tmp_path)
    assert set(config.targets) == set(LORA.targets)
    assert (config.rank, config.alpha, config.dropout) == (3, 5.0, 0.0)
    assert torch.equal(again(tokens), model(tokens))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_files_are_as_peft_writes_them(tmp_path: Path) -> None:
    config = LoraConfig(rank=2, alpha=8.0, dropout=0.05, targets=("k_proj",))
    model = plain(ScalarModel)
    apply_lora(model, config, seed=1)
    save_adapter(model.state_dict().items(), config, tmp_path, "meta-llama/Llama-2-7b-hf")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        "base_model.model.score.weight": [1, 64],
        "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight": [2, 64],
        "base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight": [32, 2],
        "base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight": [2, 64],
        "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight": [32, 2],
    }
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": "meta-llama/Llama-2-7b-hf",
        "r": 2,
        "lora_alpha": 8.0,
        "lora_dropout": 0.05,
        "target_modules": ["k_proj"],
        "modules_to_save": ["score"],
        "bias": "none",
        "inference_mode": True,
    }


@pytest.mark.parametrize("scalar", [False, True], ids=["causal", "scalar"])
def test_peft_agrees_both_ways(scalar: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed; parity cannot be checked")
    sizes = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "pad_token_id": 0,
    }
    config = LlamaConfig(**sizes, num_labels=1)
    base = (LlamaForSequenceClassification if scalar else LlamaForCausalLM)(config)
    ours = (ScalarModel if scalar else Transformer)(config_from_hf(config.to_dict()))
    ours.load_state_dict(base.state_dict())
    randomize(ours)
    base.load_state_dict(ours.state_dict())
    apply_lora(ours, LORA, seed=1)
    with torch.no_grad():
        for _, parameter in adapter_weights(ours.named_parameters()):
            parameter.normal_(0, 0.15, generator=torch.Generator().manual_seed(parameter.numel()))
    save_adapter(ours.state_dict().items(), LORA, tmp_path / "ours", str(tmp_path))
    config.save_pretrained(tmp_path)  # where PEFT looks for the size of the vocabulary

    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours", is_trainable=True).eval()
    tokens = draw(2, 15)
    if scalar:
        found, expected = ours(tokens)[:, -1:], theirs(tokens).logits
    else:
        found, expected = ours(tokens), theirs(tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    (found * upstream).sum().backward()
    (expected * upstream).sum().backward()
    gradients = {
        name.removeprefix("base_model.model.").replace(".modules_to_save", ""): p.grad
        for name, p in theirs.named_parameters()
    }
    for name, parameter in adapter_weights(ours.named_parameters()):
        left, _, right = name.rpartition(".")
        place = f"{left}.default.weight" if right == "weight" else f"{name}.default.weight"
        torch.testing.assert_close(parameter.grad, gradients[place], atol=1e-4, rtol=1e-3)

    theirs.save_pretrained(tmp_path / "theirs")
    again = type(ours)(ours.config)
    again.load_state_dict(ours.state_dict(), strict=False)
    load_adapter(again, tmp_path / "theirs")
    assert torch.equal(again(tokens), ours(tokens))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": -1}, "rank is -1; give 0 to do without"),
        ({"alpha": 0.0}, "alpha is 0.0; give a positive number"),
        ({"alpha": float("nan")}, "alpha is nan; give a positive number"),
        ({"dropout": 1.0}, r"dropout is 1.0; give 0 or more, below 1"),
        ({"targets": ("q_proj", "lm_head")}, "target 'lm_head' is unknown; take of q_proj, k_proj"),
        ({"targets": ()}, "name at least one, each once"),
        ({"targets": ("q_proj", "q_proj")}, "name at least one, each once"),
    ],
)
def test_nonsense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig(**changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(adapted().state_dict().items(), LORA, tmp_path, "base")
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "is of a IA3, not LORA; use a LoRA adapter"),
        ({"use_rslora": True}, "sets use_rslora, which is not supported"),
        ({"alpha_pattern": {"q_proj": 2}}, "sets alpha_pattern, which is not supported"),
        ({"bias": "all"}, "sets bias, which is not supported"),
        ({"r": "8"}, "r is '8'; it must be a whole number"),
        ({"target_modules": "all-linear"}, "target_modules is 'all-linear'; give a list"),
        ({"target_modules": ["wq"]}, "adapter_config.json: LoRA's target 'wq' is unknown"),
        ({"lora_dropout": 2}, "adapter_config.json: LoRA's dropout is 2.0"),
        # The tensors then do not fit.
        ({"r": 4}, r"layers.0.mlp.down_proj.lora_A is \[3, 88\] where the model has \[4, 88\]"),
        ({"target_modules": ["q_proj"]}, "down_proj.lora_A is .* where the model has no place"),
        ({"target_modules": [*LORA.targets, "k_proj"]}, "k_proj.lora_A is absent where the model"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        load_adapter(plain(), folder)


def test_adapters_with_missing_or_damaged_files_are_refused(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is truncated or corrupt"):
        load_adapter(plain(), folder)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"] = torch.ones(
        1
    )
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"q_proj.lora_magnitude_vector is .* no place for it"):
        load_adapter(plain(), folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="is absent; convert the adapter"):
        load_adapter(plain(), folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="give the folder of a LoRA adapter"):
        load_adapter(plain(), folder)
