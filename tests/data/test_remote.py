"""What lies behind an address is read as the same files on a disk: folders, archives, lists and shards, by fsspec."""

import functools
import http.server
import io
import sys
import tarfile
import threading
import zipfile

import pytest
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from collapse_probe.data.images import batches, open_data
from collapse_probe.data.preprocessing import Preprocess
from collapse_probe.data.streams.remote import public
from collapse_probe.errors import DataError

fsspec = pytest.importorskip("fsspec")
PREPROCESS = Preprocess(lambda image: pil_to_tensor(image.resize((2, 2))).float(), (2, 2), {})
NAMES = ["a/1.png", "a/2.png", "b/1.png", "b/deep/3.png"]


def encoded(number):
    stream = io.BytesIO()
    Image.new("RGB", (3, 3), (number, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A folder, a tar, a zip, a list and two shards of the same four images, on a disk."""
    root = tmp_path_factory.mktemp("remote")
    for number, name in enumerate(NAMES):
        (root / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "set" / name).write_bytes(encoded(number))
    (root / "set/words.txt").write_text("words")
    (root / "set/.hidden.png").write_bytes(encoded(9))
    with tarfile.open(root / "set.tar", "w") as tar, zipfile.ZipFile(root / "set.zip", "w") as archive:
        for name in (*NAMES, "words.txt"):
            tar.add(root / "set" / name, name)
            archive.write(root / "set" / name, name)
    with tarfile.open(root / "large.tar", "w") as tar, zipfile.ZipFile(root / "large.zip", "w") as archive:
        (root / "noise.png").write_bytes(bytes(500_000))
        for name in ("1.png", "2.png"):
            tar.add(root / "noise.png", name)
            archive.write(root / "noise.png", name)
    (root / "list.csv").write_text("path,label\n" + "".join(f"set/{name},{name[0]}\n" for name in NAMES))
    (root / "shards").mkdir()
    for shard in (0, 1):
        with tarfile.open(root / f"shards/s{shard}.tar", "w") as tar:
            for name in NAMES[2 * shard : 2 * shard + 2]:
                tar.add(root / "set" / name, name)
    return root


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, without parts."""

    def log_message(self, *_):
        pass


class Parts(Quiet):
    """Files of a folder, and parts of them where they are asked for."""

    def send_head(self):
        asked = self.headers.get("Range", "")
        if not asked.startswith("bytes="):
            return super().send_head()
        with open(self.translate_path(self.path), "rb") as file:  # noqa: PTH123
            content = file.read()
        first, last = asked.removeprefix("bytes=").split("-")
        first, last = int(first), min(int(last or len(content)), len(content) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        return io.BytesIO(content[first : last + 1])


@pytest.fixture
def serve(disk):
    servers = []

    def start(handler):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(disk)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(params=["memory", "file", "http"])
def base(request, disk, serve):
    """The address of that folder behind one kind of address."""
    if request.param == "http":
        pytest.importorskip("aiohttp")
        yield serve(Parts)
    elif request.param == "file":
        yield disk.as_uri()
    else:
        memory = fsspec.filesystem("memory")
        memory.put(str(disk), "/remote", recursive=True)
        yield "memory://remote"
        memory.rm("/remote", recursive=True)


def read(images, **settings):
    got = list(batches(images, PREPROCESS, **{"batch_size": 3, **settings}))
    return {name: int(batch.pixels[row, 0, 0, 0]) for batch in got for row, name in enumerate(batch.names)}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("where", ["set", "set.tar", "set.zip"])
def test_a_folder_and_archives(base, where, workers):
    images = open_data(f"{base}/{where}")
    assert images.address == f"{base}/{where}"
    assert images.names == NAMES
    assert images.labels == [0, 0, 1, 2]
    assert images.class_names == ("a", "b", "deep")
    assert read(images, workers=workers) == dict(zip(NAMES, range(4), strict=True))
    hidden = {"hidden, or the operating system's own": 1} if where == "set" else {}
    assert images.left_out.counts == {"no picture of a format that is read (.txt)": 1, **hidden}


def test_one_picture_and_a_split(base):
    assert read(open_data(f"{base}/set/b/1.png")) == {"1.png": 2}
    assert open_data(f"{base}/set", split="b").names == ["1.png", "deep/3.png"]
    for where in ("set.zip", "set"):
        with pytest.raises(DataError, match=r"'val'.* leave --split out"):
            open_data(f"{base}/{where}", split="val")


def test_lists(base, tmp_path):
    images = open_data(f"{base}/list.csv")
    assert images.names == [f"set/{name}" for name in NAMES]
    assert (images.labels, images.class_names) == ([0, 0, 1, 1], ("a", "b"))
    assert list(read(images).values()) == [0, 1, 2, 3]
    (tmp_path / "here.txt").write_text(f"{base}/set/a/2.png\n{base}/set/absent.png\n{base}/set/words.txt\n")
    images = open_data(tmp_path / "here.txt")
    assert list(read(images).values()) == [1]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pattern", ["shards", "shards/s{0,1}.tar"])
def test_shards(base, pattern, workers):
    stream = open_data(f"wds/{base}/{pattern}")
    names = [f"s{number // 2}/{name}" for number, name in enumerate(NAMES)]
    assert read(stream, workers=workers) == dict(zip(names, range(4), strict=True))
    assert stream.address == f"wds/{base}/{pattern}"


def test_a_cut_shard(disk):
    content = (disk / "shards/s0.tar").read_bytes()
    memory = fsspec.filesystem("memory")
    for end in (1024, 1100, 512):
        memory.pipe_file("/cut/x.tar", content[:end])
        with pytest.raises(DataError, match=r"cannot read shard x of wds/memory://cut/x.tar to its end"):
            read(open_data("wds/memory://cut/x.tar"))


def test_a_server_that_gives_no_parts(serve):
    pytest.importorskip("aiohttp")
    base = serve(Quiet)
    for name, message in (("large.tar", "range requests"), ("large.zip", "range requests")):
        with pytest.raises(DataError, match=message):
            open_data(f"{base}/{name}")
    assert list(read(open_data(f"wds/{base}/shards/s1.tar")).values()) == [2, 3]
    assert list(read(open_data(f"{base}/set")).values()) == [0, 1, 2, 3]


def test_what_is_not_there_and_what_is_not_installed(base, monkeypatch):
    for where in ("absent.tar", "absent.zip", "absent.png", "absent"):
        with pytest.raises(DataError, match=r"there is (nothing|no )|holds no image"):
            open_data(f"{base}/{where}")
    with pytest.raises(DataError, match=r"Protocol not known"):
        open_data("nonsense://x/y.tar")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for address in ("gs://bucket/set", "wds/gs://bucket/shards"):
        with pytest.raises(DataError, match=r"needs a package that is not installed; pip install gcsfs") as caught:
            open_data(address)
        assert "\n" not in str(caught.value)


def test_secrets_of_an_address_are_not_shown(serve, disk):
    pytest.importorskip("aiohttp")
    base = serve(Parts).replace("http://", "http://user:secret@")
    images = open_data(f"{base}/set.zip?signature=secret")
    assert "secret" not in images.address
    assert images.address.endswith("/set.zip")
    assert public("s3://bucket/x.tar") == "s3://bucket/x.tar"
    with pytest.raises(DataError) as caught:
        open_data(f"{base}/absent.zip?signature=secret")
    assert "secret" not in str(caught.value)
    for where in ("absent.tar", "{absent,lost}.tar"):
        with pytest.raises(DataError, match=r"there is nothing at http://.*absent.tar") as caught:
            read(open_data(f"wds/{base}/shards/{where}?signature=secret"))
        assert "secret" not in str(caught.value)


def test_a_bucket_without_credentials(monkeypatch):
    pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/absent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/absent")
    with pytest.raises(DataError, match=r"s3://bucket/set cannot be read \(NoCredentialsError.*FSSPEC_S3_ANON=true"):
        open_data("s3://bucket/set")
