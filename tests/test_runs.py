"""A run's folder: models whole or absent, checked, found, rotated."""

import json
import os
import shutil

import pytest

from gpt2_hf import runs


def write(path):
    (path / "sub").mkdir()
    (path / "model.safetensors").write_bytes(b"abc")
    (path / "sub" / "b.txt").write_text("text")


def test_written_folder_is_whole_and_replaces_the_old(tmp_path):
    folder = tmp_path / "step-00000010"
    for _ in range(2):
        runs.write_folder(folder, write)
        assert runs.damage(folder) is None
        assert {p.name for p in folder.rglob("*")} == {"sub", "model.safetensors", "b.txt", "manifest.json"}
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000010"]


def test_an_error_while_writing_leaves_the_old_one(tmp_path):
    folder = tmp_path / "step-00000010"
    runs.write_folder(folder, write)

    def fail(path):
        write(path)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        runs.write_folder(folder, fail)
    assert runs.damage(folder) is None
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000010"]


def manifest_of(text: str):
    return lambda folder: (folder / "manifest.json").write_bytes(text.encode("latin-1"))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda f: (f / "model.safetensors").write_bytes(b"ab"), "2 bytes instead of 3"),
        (lambda f: (f / "model.safetensors").write_bytes(b"abd"), "model.safetensors has changed"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json cannot be read"),
        (lambda f: (f / "manifest.json").unlink() or os.mkfifo(f / "manifest.json"), "it is not a file"),
        *(
            (manifest_of(text), "manifest.json cannot be read")
            for text in ("[]", "null", "{}", "3", '"model.safetensors"', "\xff")
        ),
        *(
            (manifest_of(f'{{"model.safetensors": {entry}}}'), "model.safetensors has no size")
            for entry in ("null", "[]", '{"bytes": 3}', "{}")
        ),
        (manifest_of('{"../step-00000010/model.safetensors": {"bytes": 3, "sha256": "x"}}'), "leads out of the folder"),
        (manifest_of('{"/etc/passwd": {"bytes": 3, "sha256": "x"}}'), "leads out of the folder"),
        (lambda f: (shutil.rmtree(f), f.write_text("file")), "it is not a folder"),
        (lambda f: (shutil.rmtree(f), f.symlink_to("nowhere")), "it is a symbolic link"),
        (lambda f: (shutil.rmtree(f), f.symlink_to("step-00000010")), "it is a symbolic link"),
    ],
)
def test_newest_whole_passes_over_damage_and_says_so(tmp_path, harm, words):
    for step in (10, 20):
        runs.write_folder(tmp_path / f"step-{step:08d}", write)
    (tmp_path / ".step-00000030.writing").mkdir()
    assert runs.newest_whole(tmp_path).name == "step-00000020"
    harm(tmp_path / "step-00000020")
    said = []
    assert runs.newest_whole(tmp_path, said.append).name == "step-00000010"
    assert len(said) == 1 and words in said[0]
    assert runs.newest_whole(tmp_path / "nothing") is None

    runs.prune(tmp_path, keep_last=1, keep_every=0)
    assert (tmp_path / "step-00000010").is_dir()  # the damaged one does not push it out
    runs.write_folder(tmp_path / "step-00000020", write)  # the run comes there again
    runs.prune(tmp_path, keep_last=1, keep_every=0)
    assert list(runs.saved_steps(tmp_path)) == [20] and runs.newest_whole(tmp_path, said.append)


def model_folder(path, weights, **files):
    """A folder as a run writes it, with ``weights`` for weights."""

    def write(folder):
        for name, content in ({"config.json": "{}", "model.safetensors": weights} | files).items():
            (folder / name).write_text(content)

    runs.write_folder(path, write)


def test_the_model_of_a_run_is_its_final_unless_there_is_a_newer_one(tmp_path):
    run, said = tmp_path / "run", []
    final, steps = run / "final", run / "checkpoints"

    def find():
        said.clear()
        return runs.find_model(run, said.append)

    for folder in (run, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no folder|no config\.json"):
            runs.find_model(folder)
    model_folder(steps / "step-00000010", "ten")
    assert find() == steps / "step-00000010" and said == [f"{run} is a run: taking {find()}, as final is not there"]
    model_folder(steps / "step-00000020", "twenty")
    model_folder(final, "twenty", **{"tokenizer.json": "{}"})
    assert find() == final and said == [f"{run} is a run: taking {final}"]
    assert runs.find_model(final) == final

    model_folder(steps / "step-00000070", "seventy")  # trained on, and killed
    assert find() == steps / "step-00000070" and "as final has other weights than step-00000070" in said[-1]
    assert runs.find_model(final) == final  # by its own name it is taken as it is
    (steps / "step-00000070" / "model.safetensors").write_text("dam")
    assert find() == final and "damaged" in said[0]

    (final / "model.safetensors").write_text("dam")
    assert find() == steps / "step-00000020" and "as final is damaged: model.safetensors has 3 bytes" in said[-1]
    for path in runs.saved_steps(steps).values():
        (path / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="no whole checkpoint, and final is damaged"):
        find()
    model_folder(final, "all that was kept")
    assert find() == final


def test_folders_without_weights_or_manifest_are_not_the_same(tmp_path):
    for name in ("a", "b"):
        runs.write_folder(tmp_path / name, lambda folder: (folder / "config.json").write_text("{}"))
    assert not runs.same_weights(tmp_path / "a", tmp_path / "b")
    for name in ("a", "b"):
        model_folder(tmp_path / name, "same")
    assert runs.same_weights(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "manifest.json").unlink()
    assert not runs.same_weights(tmp_path / "a", tmp_path / "b")


def test_prune_keeps_the_last_and_every_nth(tmp_path):
    for step in range(10, 110, 10):
        runs.write_folder(tmp_path / f"step-{step:08d}", write)
    runs.prune(tmp_path, keep_last=2, keep_every=40)
    assert list(runs.saved_steps(tmp_path)) == [40, 80, 90, 100]


def test_damaged_checkpoints_count_for_nothing(tmp_path):
    for step in (10, 20, 1000, 2000):
        runs.write_folder(tmp_path / f"step-{step:08d}", write)
    for step in (1000, 2000):  # of the same size, as a disk rots
        (tmp_path / f"step-{step:08d}" / "model.safetensors").write_bytes(b"abd")
    runs.write_folder(tmp_path / "step-00000030", write)
    runs.prune(tmp_path, keep_last=2, keep_every=0)
    assert list(runs.saved_steps(tmp_path)) == [20, 30, 1000, 2000]
    assert runs.newest_whole(tmp_path).name == "step-00000030"


def test_leftovers_of_a_kill_are_removed(tmp_path):
    run = tmp_path / "run"
    runs.write_folder(run / "checkpoints" / "step-00000010", write)
    for name in (".final.writing", ".final.deleting"):
        (run / name / "sub").mkdir(parents=True)
    for name in (".step-00000020.writing", ".step-00000005.deleting"):
        (run / "checkpoints" / name / "sub").mkdir(parents=True)
    runs.remove_leftovers(run)
    assert {path.name for path in run.rglob("*")} == {
        "checkpoints",
        "step-00000010",
        "manifest.json",
        "model.safetensors",
        "sub",
        "b.txt",
    }


def test_what_others_put_into_a_folder_stays(tmp_path):
    final = tmp_path / "final"
    model_folder(final, "old", **{"tokenizer.json": "{}"})
    (final / "README.md").write_text("mine")
    (final / "runs" / "deep").mkdir(parents=True)
    (final / "runs" / "deep" / "notes").write_text("mine too")
    (final / "link").symlink_to("nowhere")
    (final / "model-00001-of-00002.safetensors").write_text("weights of another time")
    for weights in ("new", "newer"):
        model_folder(final, weights)
        assert runs.damage(final) is None
        assert (final / "README.md").read_text() == "mine" and (final / "runs/deep/notes").read_text() == "mine too"
        names = {"README.md", "runs", "link", "model.safetensors", "config.json", "manifest.json"}
        assert {path.name for path in final.iterdir()} == names


def test_the_best_checkpoint_stays(tmp_path):
    """Best is the lowest validation loss of those that are there and whole."""
    root = tmp_path / "checkpoints"
    for step in range(10, 60, 10):
        runs.write_folder(root / f"step-{step:08d}", write)
    rows = [{"step": step, "val_loss": loss} for step, loss in ((10, 3.0), (20, 2.5), (25, 1.0), (30, 2.0), (50, 4.0))]
    odd = [{"step": 40, "val_loss": float("nan")}, {"step": 40}, {"val_loss": 0.1}, {"step": None, "val_loss": 0.1}]
    odd += [{"step": [40], "val_loss": 0.1}, {"step": 40, "val_loss": "0.1"}, [40, 0.1], None, 3]
    text = "".join(json.dumps(row) + "\n" for row in [*rows, *odd]).encode()
    (tmp_path / "metrics.jsonl").write_bytes(text + b"\xff{\n" + b"[" * 100_000 + b'\n{"step": 40, "val_lo')
    assert runs.best_step(tmp_path) == 30
    (root / "step-00000030" / "model.safetensors").write_bytes(b"abd")
    assert runs.best_step(tmp_path) == 20
    runs.prune(root, keep_last=1, keep_every=0, best=runs.best_step(tmp_path))
    assert list(runs.saved_steps(root)) == [20, 50] and runs.best_step(tmp_path) == 20
    (tmp_path / "metrics.jsonl").unlink()
    assert runs.best_step(tmp_path) is None


def test_a_checkpoint_that_cannot_be_deleted_ends_nothing(tmp_path, monkeypatch):
    for step in (10, 20):
        runs.write_folder(tmp_path / f"step-{step:08d}", write)

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(runs.os, "replace", refuse)
    said = []
    runs.prune(tmp_path, keep_last=1, keep_every=0, warn=said.append)
    assert said == [f"{tmp_path}/step-00000010 is no longer needed and cannot be deleted: Read-only file system"]
