"""Data folders in object storage, read from a real S3 server behind a proxy that fails when told to."""

import fcntl
import hashlib
import http.server
import importlib.util
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import types
import uuid
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
from faulty_server import FaultyServer

from gpt2_hf.data import remote, storage
from gpt2_hf.data.cache import Cache
from gpt2_hf.data.folder import LocalFolder, ShardError
from gpt2_hf.data.remote import RemoteFolder, Retry, open_folder
from gpt2_hf.data.shards import open_split
from gpt2_hf.data.stream import TokenStream

QUICK = Retry(timeout=20, first_wait=0.02, longest_wait=0.05, give_up=30)
IMPATIENT = Retry(timeout=1, first_wait=0.02, longest_wait=0.05, give_up=30)
KB = 1000
CHUNK = 64 * KB
UPLOADS: dict[str, fsspec.AbstractFileSystem] = {}

# Without gpt2_hf/__init__.py, which imports transformers: 10 seconds a process.
PREAMBLE = f"""
import sys, types
package = types.ModuleType("gpt2_hf")
package.__path__ = [{str(Path(storage.__file__).parent.parent)!r}]
sys.modules["gpt2_hf"] = package
from gpt2_hf.data import storage
from gpt2_hf.data.remote import RemoteFolder, Retry
storage.CHUNK_BYTES = {CHUNK}
"""


def random_bytes(n, seed):
    return np.random.default_rng(seed).bytes(n)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(storage, "CHUNK_BYTES", CHUNK)


@pytest.fixture(scope="module")
def s3_server():
    for package in ("s3fs", "moto", "flask", "flask_cors"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}, which is missing: pip install s3fs 'moto[s3]' flask flask-cors")
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    # For uploads, past the faults; one client for all tests, as a new one takes half a second.
    UPLOADS["s3"] = fsspec.filesystem("s3", endpoint_url=f"http://{host}:{port}", key="tester", secret="secret")
    yield host, port
    server.stop()


@pytest.fixture
def proxy(s3_server, monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    server = FaultyServer(s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tester")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    yield server
    server.close()


def new_url(kind, tmp_path):
    if kind == "s3":
        return f"s3://bucket-{uuid.uuid4().hex[:12]}/some/folder"
    return f"memory://{uuid.uuid4().hex}/folder" if kind == "memory" else f"file://{tmp_path}/storage"


def upload(url, files):
    """`files`: name -> bytes."""
    kind, _, root = url.partition("://")
    fs = UPLOADS.get(kind) or fsspec.filesystem(kind)
    if kind == "s3" and not fs.exists(bucket := root.split("/")[0]):
        fs.mkdir(bucket)
    for name, content in files.items():
        if kind != "s3":
            fs.makedirs(f"{root}/{name}".rsplit("/", 1)[0], exist_ok=True)
        fs.pipe(f"{root}/{name}", content)


@pytest.fixture(params=["memory", "file", "s3"])
def any_url(request, tmp_path):
    if request.param == "s3":
        request.getfixturevalue("proxy")
    return new_url(request.param, tmp_path)


@pytest.fixture
def bucket(proxy, tmp_path):
    """A folder in S3 with a file of 5 chunks."""
    url = new_url("s3", tmp_path)
    upload(url, {"train/0.ds": random_bytes(300 * KB, 0)})
    proxy.requests.clear()
    return url


def faults(name, *planned):
    """The first reads of the file meet these, later ones nothing."""
    left = list(planned)
    return lambda request: left.pop(0) if left and request.reads(name) else ""


def cached(cache, suffix="data"):
    return sorted(path.name for path in cache.glob(f"*.{suffix}"))


def waits(caplog):
    return [record.getMessage() for record in caplog.records if "next try in" in record.getMessage()]


# What a folder gives


def test_a_path_is_a_local_folder(tmp_path):
    assert isinstance(open_folder(tmp_path), LocalFolder)
    assert open_folder(str(tmp_path)).location == str(tmp_path)


def test_reads_what_is_stored(any_url, tmp_path):
    files = {
        "manifest.json": b"{}",
        "train/0.ds": random_bytes(200 * KB, 0),
        "train/deep/1.ds": b"",
        "val/0.ds": b"12345678",
    }
    upload(any_url, files)
    folder = open_folder(any_url + "/", tmp_path / "cache", retry=QUICK)
    assert folder.location == any_url
    assert list(folder.sizes().items()) == sorted((name, len(content)) for name, content in files.items())
    for when in ("not cached", "cached"):
        for name, content in files.items():
            n = len(content)
            for start, stop in ((0, None), (3, None), (0, 0), (2, 7), (n - 8, None), (n - 8, n + 5), (n, None), (5, 3)):
                assert folder.read(name, max(start, 0), stop) == content[max(start, 0) : stop], (
                    when,
                    name,
                    start,
                    stop,
                )
        for name, dtype in (("train/0.ds", "<u2"), ("val/0.ds", "<i8"), ("train/deep/1.ds", "<u2")):
            array = folder.map(name, dtype)
            assert array.dtype == np.dtype(dtype) and type(array) is np.ndarray
            assert not len(array) or not array.flags.writeable
            np.testing.assert_array_equal(array, np.frombuffer(files[name], dtype))
    assert len(cached(tmp_path / "cache")) == 2 and not cached(tmp_path / "cache", "part")


def test_one_file_and_what_lies_beside_it(any_url, tmp_path):
    """As LocalFolder has it."""
    upload(any_url, {name: name.encode() for name in ("x.ds", "x.ds.index", "x.ds.metadata", "y.ds", "manifest.json")})
    folder = RemoteFolder(f"{any_url}/x.ds", tmp_path)
    assert folder.location == any_url and list(folder.sizes()) == ["x.ds", "x.ds.index", "x.ds.metadata"]
    assert folder.read("x.ds.index") == b"x.ds.index"
    assert len(RemoteFolder(f"{any_url}/manifest.json", tmp_path).sizes()) == 5


def test_small_reads_ask_for_their_bytes_only(proxy, bucket, tmp_path):
    folder = RemoteFolder(bucket, tmp_path)
    folder.read("train/0.ds", 299_992)
    assert proxy.reads("0.ds") == ["bytes=299992-299999"] and not cached(tmp_path)


def test_training_over_s3_equals_local_training(proxy, make_shards, tmp_path):
    documents = [[list(range(100 * i + 7 * j, 100 * i + 8 * j + 1)) for j in range(40)] for i in range(5)]
    local = make_shards({"train": documents})
    url = new_url("s3", tmp_path)
    upload(url, {str(path.relative_to(local)): path.read_bytes() for path in local.rglob("*") if path.is_file()})
    # The split has about 9 KB.
    folder = open_folder(url, tmp_path / "cache", cache_gb=4e-6, retry=Retry(first_wait=0.01, longest_wait=0.02))
    proxy.plan = lambda request: random.Random(len(proxy.requests)).choice(["503", "", "truncate", "", ""])
    here, there = open_split(local, "train"), open_split(folder, "train")
    assert here.fingerprint == there.fingerprint
    streams = [TokenStream(shards, 16, seed=3) for shards in (here, there)]
    np.testing.assert_array_equal(*(stream.batch(0, stream.n_windows * 3 // 2) for stream in streams))
    assert proxy.reads("00003.ds")


def test_an_endpoint_from_fsspec_s_configuration(proxy, bucket, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    configured = {"endpoint_url": proxy.url, "config_kwargs": {"connect_timeout": 3}}
    monkeypatch.setitem(fsspec.config.conf, "s3", configured)
    assert RemoteFolder(bucket, tmp_path).sizes() == {"train/0.ds": 300 * KB}


def test_http(tmp_path):
    upload(f"file://{tmp_path}/www", {"data/train/0.ds": b"0123456789", "data/big.ds": random_bytes(100 * KB, 0)})

    class Handler(http.server.SimpleHTTPRequestHandler):  # which lists folders and ignores ranges
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "www")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://user:password@127.0.0.1:{server.server_address[1]}/data"
    try:
        folder = RemoteFolder(url, tmp_path / "cache", retry=QUICK)
        assert folder.sizes() == {"train/0.ds": 10, "big.ds": 100 * KB}
        assert folder.map("train/0.ds", "u1").tobytes() == b"0123456789"
        with pytest.raises(ShardError, match="100,000 bytes came instead of 64,000") as error:
            folder.map("big.ds", "u1")
        assert "password" not in str(error.value) + folder.location
    finally:
        server.shutdown()
        server.server_close()


# When the storage fails


@pytest.mark.parametrize(
    "fault, reason",
    [
        ("503", "HTTP 503, Please reduce your request rate."),
        ("reset", ""),
        ("truncate", "32000 of 64000 bytes"),
        ("trickle", "no answer for 1 s"),
    ],
)
def test_waits_says_so_and_reads_the_same_bytes(proxy, bucket, tmp_path, caplog, fault, reason):
    folder = RemoteFolder(bucket, tmp_path, retry=IMPATIENT if "no answer" in reason else QUICK)
    caplog.clear()
    proxy.plan = faults("0.ds", "", fault, fault)
    assert folder.map("train/0.ds", "u1").tobytes() == random_bytes(300 * KB, 0)
    # A connection that was in use before and is reset is tried once more by aiohttp itself; and on a busy machine a
    # good answer may take more than a second.
    assert len(waits(caplog)) in {"reset": (1, 2), "trickle": range(2, 9)}.get(fault, (2,))
    for line in waits(caplog):
        assert line.startswith(f"{bucket}/train/0.ds: ") and reason in line and "\n" not in line


def test_opening_waits_too(proxy, bucket, tmp_path, caplog):
    planned = ["stall", "500", "503"]
    proxy.plan = lambda request: planned.pop(0) if planned else ""
    assert RemoteFolder(bucket, tmp_path, retry=IMPATIENT).sizes() == {"train/0.ds": 300 * KB}
    assert len(waits(caplog)) >= 3 and all(line.startswith(f"{bucket}: ") for line in waits(caplog))


def test_waits_grow_and_vary(proxy, bucket, tmp_path, caplog):
    folder = RemoteFolder(bucket, tmp_path, retry=Retry(timeout=5, first_wait=0.04, longest_wait=0.2))
    proxy.plan = faults("0.ds", *["503"] * 7)
    slept = []
    real_sleep = time.sleep
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.time, "sleep", lambda seconds: (slept.append(seconds), real_sleep(0.001)))
        folder.map("train/0.ds", "u1")
    for seconds, longest in zip(slept, (0.04, 0.08, 0.16, 0.2, 0.2, 0.2, 0.2), strict=True):
        assert longest / 2 <= seconds <= longest
    assert len(set(slept)) == 7


@pytest.fixture
def ten_seconds_a_request(proxy, monkeypatch):
    """A clock for storage.py that goes on by 10 seconds with each request."""
    clock = types.SimpleNamespace(time_ns=time.time_ns, sleep=lambda seconds: None)
    clock.monotonic = lambda: 10.0 * len(proxy.requests)
    monkeypatch.setattr(storage, "time", clock)


def test_gives_up_in_one_line(proxy, bucket, tmp_path, ten_seconds_a_request):
    folder = RemoteFolder(bucket, tmp_path, retry=Retry(give_up=42))
    proxy.plan = faults("0.ds", "", *["503"] * 1000)
    with pytest.raises(ShardError) as error:
        folder.map("train/0.ds", "u1")
    line = f"{bucket}/train/0.ds: HTTP 503, Please reduce your request rate.; given up after 40 s: check the bucket"
    assert str(error.value).startswith(line) and "\n" not in str(error.value)
    assert not cached(tmp_path) and not cached(tmp_path, "part")
    proxy.plan = lambda request: ""
    assert folder.map("train/0.ds", "u1").tobytes() == random_bytes(300 * KB, 0)


def test_slow_progress_is_not_given_up(proxy, bucket, tmp_path, ten_seconds_a_request):
    folder = RemoteFolder(bucket, tmp_path, retry=Retry(give_up=45))
    proxy.plan = faults("0.ds", *["503", "503", "503", ""] * 2)
    assert folder.map("train/0.ds", "u1").tobytes() == random_bytes(300 * KB, 0)
    assert len(proxy.reads("0.ds")) == 2 * 4 + 3


def one_line_at_once(caplog, url, action):
    started = time.monotonic()
    with pytest.raises(ShardError) as error:
        action()
    assert time.monotonic() - started < 20 and not waits(caplog)
    line = str(error.value)
    assert "\n" not in line and line.startswith(url), line
    return line


def test_what_waiting_cannot_mend_fails_at_once(proxy, bucket, tmp_path, caplog, monkeypatch):
    missing = "s3://no-such-bucket/folder"
    line = one_line_at_once(caplog, missing, lambda: RemoteFolder(missing, tmp_path))
    assert "bucket does not exist" in line and "AWS_ACCESS_KEY_ID" in line and f"AWS_ENDPOINT_URL ({proxy.url})" in line
    line = one_line_at_once(caplog, f"{bucket}/nope", lambda: RemoteFolder(f"{bucket}/nope", tmp_path))
    assert "there are no files below it" in line

    folder = RemoteFolder(bucket, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"train/1\.ds does not exist"):
        folder.map("train/1.ds", "u1")
    proxy.plan = faults("0.ds", "403")
    assert "HTTP 403" in one_line_at_once(caplog, f"{bucket}/train/0.ds", lambda: folder.map("train/0.ds", "u1"))
    UPLOADS["s3"].rm(f"{bucket}/train/0.ds")
    assert "HTTP 404" in one_line_at_once(caplog, f"{bucket}/train/0.ds", lambda: folder.map("train/0.ds", "u1"))

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert "credentials" in one_line_at_once(caplog, bucket, lambda: RemoteFolder(bucket, tmp_path))


def test_missing_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(ImportError, match=r"^abfs://container/x: abfs:// needs the package adlfs: pip install adlfs$"):
        RemoteFolder("abfs://container/x", tmp_path)
    with pytest.raises(ShardError, match=r"^sss://bucket: Protocol not known: sss: "):
        RemoteFolder("sss://bucket", tmp_path)


def test_offline_is_not_waited_for(tmp_path, caplog, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    url = "hf://datasets/me/data/folder"
    assert "HF_HUB_OFFLINE" in one_line_at_once(caplog, url, lambda: RemoteFolder(url, tmp_path))


def test_password_in_url_is_not_shown(tmp_path):
    with pytest.raises(ShardError) as error:
        RemoteFolder("memory://user:secret@folder", tmp_path)
    assert "secret" not in str(error.value) and "://***@folder" in str(error.value)


# Damage


def test_checksum_of_the_manifest_is_compared(proxy, tmp_path, caplog):
    url, content = new_url("s3", tmp_path), random_bytes(100 * KB, 1)
    entry = {"file": "train/0.ds", "sha256": hashlib.sha256(content).hexdigest(), "index_sha256": "0" * 64}
    upload(
        url, {"manifest.json": json.dumps({"splits": {"train": {"shards": [entry]}}}).encode(), "train/0.ds": content}
    )
    proxy.plan = faults("0.ds", "corrupt")
    folder = open_folder(url, tmp_path / "cache", retry=QUICK)
    assert folder.map("train/0.ds", "u1").tobytes() == content
    assert [record.getMessage().endswith("fetching it again") for record in caplog.records] == [True]

    upload(url, {"train/0.ds": content[:-1] + b"?"})
    folder = open_folder(url, tmp_path / "cache", retry=QUICK)
    with pytest.raises(
        ShardError, match=rf"^{url}/train/0.ds: sha256 is [0-9a-f]+\.\.\., the manifest says .*, twice: "
    ):
        folder.map("train/0.ds", "u1")
    assert len(cached(tmp_path / "cache")) == 1  # the good one, of the old object


@pytest.mark.parametrize("manifest", [b"", b"{", b"[]", b'{"splits": {"train": {"shards": [{"file": 1}]}}}'])
def test_a_garbled_manifest_is_left_to_the_reader(tmp_path, manifest):
    url = new_url("memory", tmp_path)
    upload(url, {"manifest.json": manifest, "x": b"1"})
    assert open_folder(url, tmp_path / "cache").read("manifest.json") == manifest


def test_changed_objects_are_noticed(any_url, tmp_path):
    old, new, other = (random_bytes(100 * KB, seed) for seed in range(3))
    upload(any_url, {"a": old, "b": old})
    before = RemoteFolder(any_url, tmp_path / "cache", retry=QUICK)
    before.map("a", "u1")
    upload(any_url, {"a": new, "b": other})  # of the same size
    after = RemoteFolder(any_url, tmp_path / "cache", retry=QUICK)
    assert after.map("a", "u1").tobytes() == new and after.map("b", "u1").tobytes() == other
    assert before.map("a", "u1").tobytes() == old  # it has its copy
    for _ in range(2):  # it has no copy, and must not make one
        with pytest.raises(ShardError, match="b has changed since this run opened it"):
            RemoteFolder.map(before, "b", "u1")


def test_a_change_in_the_middle_of_a_fetch_is_noticed(proxy, bucket, tmp_path):
    folder = RemoteFolder(bucket, tmp_path)
    changed = []

    def plan(request):
        if request.range.startswith("bytes=128000-") and not changed:
            changed.append(True)
            proxy.plan = lambda request: ""
            threading.Thread(target=upload, args=(bucket, {"train/0.ds": random_bytes(300 * KB, 1)})).start()
            return "slow"
        return ""

    proxy.plan = plan
    with pytest.raises(ShardError, match="changed"):
        folder.map("train/0.ds", "u1")
    assert not cached(tmp_path) and not cached(tmp_path, "part")
    assert RemoteFolder(bucket, tmp_path).map("train/0.ds", "u1").tobytes() == random_bytes(300 * KB, 1)


def test_a_shortened_cached_file_is_fetched_again(tmp_path):
    upload(url := new_url("memory", tmp_path), {"a": b"0123456789"})
    folder = RemoteFolder(url, tmp_path / "cache")
    folder.map("a", "u1")
    (path,) = (tmp_path / "cache").glob("*.data")
    path.write_bytes(b"01234")
    assert folder.read("a") == b"0123456789" and folder.map("a", "u1").tobytes() == b"0123456789"


def test_a_killed_fetch_is_never_used(proxy, bucket, tmp_path):
    reached = threading.Event()

    def plan(request):
        if request.range.startswith("bytes=128000-"):
            reached.set()
            return "stall"
        return ""

    proxy.plan = plan
    program = PREAMBLE + f"RemoteFolder({bucket!r}, {str(tmp_path)!r}).map('train/0.ds', 'u1')"
    process = subprocess.Popen([sys.executable, "-c", program])
    assert reached.wait(30)
    (part,) = tmp_path.glob("*.part")
    assert part.stat().st_size == 300 * KB and part.read_bytes()[: 2 * CHUNK] == random_bytes(300 * KB, 0)[: 2 * CHUNK]
    RemoteFolder(bucket, tmp_path)
    assert part.exists()  # somebody is at work on it
    process.send_signal(signal.SIGKILL)
    process.wait()

    proxy.plan = lambda request: ""
    proxy.requests.clear()
    assert RemoteFolder(bucket, tmp_path).map("train/0.ds", "u1").tobytes() == random_bytes(300 * KB, 0)
    assert len(proxy.reads("0.ds")) == 5 and cached(tmp_path) == [part.with_suffix(".data").name]
    assert not cached(tmp_path, "part")


def test_rubbish_of_killed_fetches_is_removed(tmp_path):
    url = new_url("memory", tmp_path)
    upload(url, {"a": b"1"})
    part, theirs = tmp_path / f"{'0' * 32}.part", tmp_path / "thesis.part"
    part.write_bytes(b"half")
    theirs.write_bytes(b"mine")
    RemoteFolder(url, tmp_path, cache_bytes=2)
    assert not part.exists() and theirs.exists()


def test_full_disk_is_one_line(tmp_path, monkeypatch):
    url = new_url("memory", tmp_path)
    upload(url, {"a": b"12345678"})
    folder = RemoteFolder(url, tmp_path / "cache")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            ShardError, match=r"^cannot write to the cache .*/cache \(No space left on device\): free space"
        ):
            folder.map("a", "u1")
    assert not cached(tmp_path / "cache") and not cached(tmp_path / "cache", "part")
    assert folder.map("a", "u1").tobytes() == b"12345678"


def test_unusable_cache_folder_is_one_line(tmp_path):
    upload(url := new_url("memory", tmp_path), {"a": b"1"})
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardError, match=r"^cannot use the cache .*/file \(File exists\): set data.cache_dir$"):
        RemoteFolder(url, tmp_path / "file")


# The cache


def test_cache_is_bounded_over_an_epoch_larger_than_it(tmp_path):
    cache, files = tmp_path / "cache", {f"{i:02d}.ds": random_bytes((6 + i % 4) * KB, i) for i in range(25)}
    upload(url := new_url("memory", tmp_path), files)
    bound = 100 * KB
    folder = RemoteFolder(url, cache, bound)
    most, stop = [0], threading.Event()

    def watch():
        with open(cache / ".lock", "ab") as lock:
            while not stop.is_set():
                fcntl.flock(lock, fcntl.LOCK_EX)  # else it would count one file before a change and one after
                files = [*cache.glob("*.data"), *cache.glob("*.part")]
                most[0] = max(most[0], sum(path.stat().st_size for path in files if path.exists()))
                fcntl.flock(lock, fcntl.LOCK_UN)
                time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    held = []
    try:
        for _ in range(2):
            for name in files:
                folder.fetch_ahead(name)
                held.append((name, folder.map(name, "u1")))
    finally:
        stop.set()
        watcher.join()
    assert bound // 2 < most[0] <= bound
    for name, array in held:  # removed from the cache long ago, but still mapped
        assert array.tobytes() == files[name]


def test_the_files_unused_for_longest_are_removed(tmp_path):
    """Against a list kept by hand."""
    choose = random.Random(0)
    files = {f"{i}": random_bytes(choose.randint(1, 40) * KB, i) for i in range(12)}
    url = new_url("memory", tmp_path)
    upload(url, files)
    folder = RemoteFolder(url, tmp_path / "cache", 100 * KB)
    expected: list[str] = []
    for _ in range(150):
        name = choose.choice(sorted(files))
        folder.map(name, "u1")
        if name in expected:
            expected.remove(name)
        while sum(len(files[other]) for other in [*expected, name]) > 100 * KB:
            expected.pop(0)
        expected.append(name)
        assert {path.read_bytes() for path in (tmp_path / "cache").glob("*.data")} == {
            files[other] for other in expected
        }


def test_a_lowered_bound_holds_at_once(tmp_path):
    upload(url := new_url("memory", tmp_path), {f"{i}": bytes(10 * KB) for i in range(5)})
    folder = RemoteFolder(url, tmp_path / "cache", 50 * KB)
    for name in folder.sizes():
        folder.map(name, "u1")
    assert len(cached(tmp_path / "cache")) == 5
    RemoteFolder(url, tmp_path / "cache", 25 * KB)
    assert len(cached(tmp_path / "cache")) == 2


def test_a_file_larger_than_the_cache(tmp_path):
    upload(url := new_url("memory", tmp_path), {"a": bytes(3000), "b": bytes(2000)})
    folder = RemoteFolder(url, tmp_path / "cache", 2000)
    with pytest.raises(
        ShardError, match=r"/a has 3e-06 GB, more than the whole cache of 2e-06 GB in .*: raise data\.cache_gb$"
    ):
        folder.map("a", "u1")
    assert folder.map("b", "u1").tobytes() == bytes(2000)  # to the last byte


def test_default_cache_lies_in_the_hugging_face_folder(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path))
    upload(url := new_url("memory", tmp_path), {"a": b"1"})
    open_folder(url).map("a", "u1")
    assert len(cached(tmp_path / "gpt2_hf")) == 1


def test_processes_fetch_each_shard_once(proxy, tmp_path):
    url = new_url("s3", tmp_path)
    upload(url, {f"{i}.ds": random_bytes(100 * KB, i) for i in range(2)})
    proxy.requests.clear()
    proxy.plan = lambda request: "slow" if request.range else ""
    program = PREAMBLE + (
        f"folder = RemoteFolder({url!r}, {str(tmp_path / 'cache')!r})\n"
        "import hashlib\n"
        "for name in folder.sizes(): folder.fetch_ahead(name)\n"
        "for name in folder.sizes(): print(hashlib.sha256(folder.map(name, 'u1')).hexdigest())\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    expected = [hashlib.sha256(random_bytes(100 * KB, i)).hexdigest() for i in range(2)]
    assert [process.communicate(timeout=60)[0].split() for process in processes] == [expected] * 2
    for i in range(2):
        assert sorted(proxy.reads(f"{i}.ds")) == ["bytes=0-63999", "bytes=64000-99999"]


def test_a_file_that_came_while_its_lock_was_waited_for_is_not_fetched_again(tmp_path):
    cache, key, n_writers = Cache(tmp_path, 1000), "0" * 32, []
    first_is_at_work, go_on = threading.Event(), threading.Event()

    def write(part):
        n_writers.append(1)
        first_is_at_work.set()
        go_on.wait(20)
        part.write(b"1")

    threads = [threading.Thread(target=lambda: cache.fetch(key, 1, write).close()) for _ in range(3)]
    for thread in threads:
        thread.start()
        assert first_is_at_work.wait(20)
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(n_writers) == 1 and cache.open(key, 1).read() == b"1" and cached(tmp_path, "part") == []


# Fetching ahead


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_fetch_ahead_returns_at_once_and_fetches_once(proxy, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FETCHES", 1)
    url = new_url("s3", tmp_path)
    upload(url, {f"{i}.ds": random_bytes(50 * KB, i) for i in range(3)})
    folder = RemoteFolder(url, tmp_path / "cache")
    proxy.requests.clear()
    proxy.most_active = 0
    proxy.plan = lambda request: "slow" if request.range else ""
    for name in [*folder.sizes(), "0.ds", "1.ds"]:
        folder.fetch_ahead(name)
    assert len(cached(tmp_path / "cache")) < 3  # it did not wait for them
    wait_until(lambda: len(cached(tmp_path / "cache")) == 3)
    assert proxy.most_active == 1
    for i in range(3):
        assert folder.map(f"{i}.ds", "u1").tobytes() == random_bytes(50 * KB, i)
        assert len(proxy.reads(f"{i}.ds")) == 1


def test_an_error_while_fetching_ahead_is_logged_and_met_again(proxy, bucket, tmp_path, caplog):
    folder = RemoteFolder(bucket, tmp_path, retry=QUICK)
    proxy.plan = faults("0.ds", "403", "403")
    folder.fetch_ahead("train/0.ds")
    wait_until(lambda: any("while fetching ahead" in record.getMessage() for record in caplog.records))
    with pytest.raises(ShardError, match="403"):
        folder.map("train/0.ds", "u1")
    folder.fetch_ahead("train/0.ds")  # the thread is alive, or another is
    wait_until(lambda: cached(tmp_path))
    assert folder.map("train/0.ds", "u1").tobytes() == random_bytes(300 * KB, 0)


def test_a_file_needed_at_once_does_not_wait_in_the_queue(proxy, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FETCHES", 1)
    url = new_url("s3", tmp_path)
    upload(url, {"a": random_bytes(50 * KB, 0), "b": random_bytes(50 * KB, 1), "c": random_bytes(50 * KB, 2)})
    folder = RemoteFolder(url, tmp_path / "cache", retry=Retry(timeout=20))
    proxy.plan = faults("a", "stall")
    for name in "abc":
        folder.fetch_ahead(name)
    assert folder.map("b", "u1").tobytes() == random_bytes(50 * KB, 1)
    assert not proxy.reads("c")


def test_a_file_large_for_the_cache_is_not_fetched_ahead(tmp_path, monkeypatch):
    """Those of one group would push each other out, and be fetched twice."""
    upload(url := new_url("memory", tmp_path), {"large": bytes(11), "small": bytes(10)})
    folder, fetched = RemoteFolder(url, tmp_path / "cache", 100), []
    monkeypatch.setattr(folder, "_fetch", fetched.append)
    folder.fetch_ahead("large")
    folder.fetch_ahead("small")
    wait_until(lambda: fetched)
    assert fetched == ["small"]


def test_a_process_ends_while_it_waits_for_the_storage(proxy, bucket, tmp_path):
    proxy.plan = faults("0.ds", *["stall"] * 100)
    program = PREAMBLE + (
        f"folder = RemoteFolder({bucket!r}, {str(tmp_path)!r}, retry=Retry(timeout=30))\n"
        "folder.fetch_ahead('train/0.ds')\n"
        "input()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
    wait_until(lambda: proxy.reads("0.ds"))
    process.communicate(b"\n", timeout=20)
    assert process.returncode == 0
