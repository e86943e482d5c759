import json
import subprocess
import sys

import pytest

from ssmoe.training.folder import (
    CONFIG,
    ENVIRONMENT,
    check_data,
    check_folder,
    create_folder,
    lock_folder,
    read_environment,
    read_run,
)

DATA = {"content": "abc", "tokenizer": "def"}


@pytest.fixture
def run(tiny_run):
    return tiny_run()


@pytest.fixture
def folder(run, tmp_path):
    """A run folder with the name of a checkpoint in it."""
    path = tmp_path / "runs" / "one"
    create_folder(path, run, "reference", data=DATA)
    (path / "checkpoints" / "step-3").mkdir(parents=True)
    return path


def test_what_is_written_is_enough_to_repeat(folder, run):
    assert read_run(folder) == run
    found = read_environment(folder)
    assert found["data"] == DATA
    assert found["backend"] == "reference"
    assert {"versions", "device", "threads", "seed", "git", "platform"} <= found.keys()
    assert {"python", "torch", "ssmoe"} <= found["versions"].keys()


def test_a_new_or_empty_folder_may_be_written(run, tmp_path):
    check_folder(tmp_path / "a" / "b", run, resume=False, overwrite=False)
    (tmp_path / "empty").mkdir()
    check_folder(tmp_path / "empty", run, resume=False, overwrite=False)
    assert not (tmp_path / "a").exists()


def test_an_existing_run_needs_to_be_told(folder, run):
    with pytest.raises(ValueError, match="--resume to go on, --overwrite to replace"):
        check_folder(folder, run, resume=False, overwrite=False)
    check_folder(folder, run, resume=True, overwrite=False)
    check_folder(folder, run, resume=False, overwrite=True)
    with pytest.raises(ValueError, match="exclude each other"):
        check_folder(folder, run, resume=True, overwrite=True)


@pytest.mark.parametrize("names", [["thesis.tex"], [CONFIG], [ENVIRONMENT]])
def test_only_run_folders_are_overwritten(run, tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="is not a run folder"):
        check_folder(tmp_path, run, resume=False, overwrite=True)


def test_a_file_in_the_way_is_refused(run, tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    path.chmod(0o755)
    with pytest.raises(ValueError, match="exists"):
        check_folder(path, run, resume=False, overwrite=True)
    with pytest.raises(ValueError, match="not a folder that can be written"):
        check_folder(path / "below", run, resume=False, overwrite=False)


@pytest.mark.parametrize("change", ["train.steps=7", "model.d_model=32", "data.context=16"])
def test_another_configuration_is_not_resumed(folder, tiny_run, change):
    with pytest.raises(ValueError, match=f"started with another {change.split('=')[0]}"):
        check_folder(folder, tiny_run(change), resume=True, overwrite=False)


def test_the_cache_may_move(folder, tiny_run):
    check_folder(folder, tiny_run("data.cache_dir=/elsewhere"), resume=True, overwrite=False)


def test_nothing_to_resume(run, tmp_path, folder):
    with pytest.raises(ValueError, match="nothing to resume"):
        check_folder(tmp_path / "new", run, resume=True, overwrite=False)
    (folder / "checkpoints" / "step-3").rmdir()
    with pytest.raises(ValueError, match="no checkpoint yet: start it again with --overwrite"):
        check_folder(folder, run, resume=True, overwrite=False)


@pytest.mark.parametrize("key", list(DATA))
def test_changed_data_are_refused(folder, key):
    check_data(folder, DATA)
    with pytest.raises(ValueError, match="has changed since the run began"):
        check_data(folder, {**DATA, key: "other"})


def test_creating_replaces_the_old_run(folder, run):
    create_folder(folder, run, "reference", data=DATA)
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, ENVIRONMENT]


def test_damaged_files_are_named(folder):
    for content in ("{", "[]", "{}", '{"backend": "reference", "data": {}}', '{"backend": 1, "data": 2}'):
        (folder / ENVIRONMENT).write_text(content)
        with pytest.raises(ValueError, match=r"environment\.json is damaged: train anew"):
            read_environment(folder)
    content = json.loads((folder / CONFIG).read_text())
    content["train"]["steps"] = -1
    (folder / CONFIG).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"config\.json is not the configuration of a run \(train\.steps"):
        read_run(folder)
    (folder / CONFIG).write_text("{")
    with pytest.raises(ValueError, match=r"is not the configuration of a run \(Invalid JSON"):
        read_run(folder)


HOLD = """
import sys
from pathlib import Path
from ssmoe.training.folder import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_trains_into_a_folder(folder, run):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process is training into"), lock_folder(folder):
            pass
        assert read_run(folder) == run
    finally:
        holder.kill()
        holder.communicate()
    with lock_folder(folder):  # a killed holder holds nothing
        create_folder(folder, run, "reference", data=DATA)
        # clearing the folder has not cleared the lock away
        with pytest.raises(ValueError, match="another process is training into"), lock_folder(folder):
            pass
    assert not (folder / "checkpoints").exists()


def test_a_lock_alone_is_no_run(run, tmp_path):
    with lock_folder(tmp_path / "new"):
        check_folder(tmp_path / "new", run, resume=False, overwrite=False)
    check_folder(tmp_path / "new", run, resume=False, overwrite=False)
