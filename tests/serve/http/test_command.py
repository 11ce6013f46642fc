"""What `peftk serve` refuses before it serves."""

from __future__ import annotations

import json
import shutil
import socket

import pytest
import torch
from click.testing import CliRunner

from peftk.cli import main
from peftk.serve.http import loading


def refused(*arguments, **env):
    result = CliRunner().invoke(main, ["serve", *map(str, arguments)], env=env)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return result.output


def test_a_folder_without_a_model(tmp_path):
    assert "expected a folder with config.json, or a .gguf file" in refused(tmp_path, "--port", 0)


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    assert "expected a folder with config.json, or a .gguf file" in refused(tmp_path / "model.bin", "--port", 0)


def test_a_secret_that_is_too_short_and_one_that_is_not_there(model_folder, tmp_path):
    (tmp_path / "token").write_text("short\n")
    assert "admin token: expected 8 or more" in refused(model_folder, "--admin-token-file", tmp_path / "token")
    assert "api key: expected 8 or more" in refused(model_folder, PEFTK_API_KEY="short")
    assert "No such file" in refused(model_folder, "--api-key-file", tmp_path / "none")


def test_a_port_in_use(model_folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use" in refused(model_folder, "--port", taken.getsockname()[1])


def test_weights_in_a_pickle_are_not_read(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    torch.save({}, tmp_path / "model/pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        loading.load(tmp_path / "model", None)


def test_code_beside_a_model_is_not_run(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    mapped = {"AutoModelForCausalLM": "code.Model", "AutoConfig": "code.Config"}
    changed = {**config, "auto_map": mapped, "model_type": "own"}
    (tmp_path / "model/config.json").write_text(json.dumps(changed))
    (tmp_path / "model/code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises((ValueError, OSError)):
        loading.load(tmp_path / "model", None)
    assert not (tmp_path / "ran").exists()


def test_which_models_generate(model_folder):
    loaded = loading.load(model_folder, torch.bfloat16)
    assert loaded.pooling is None
    assert loaded.model.dtype == torch.bfloat16
    assert not loaded.model.training
