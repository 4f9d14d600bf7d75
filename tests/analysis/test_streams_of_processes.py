"""A stream under torchrun, with processes that read, is measured as the same images in a folder: every image once."""

import io
import socket
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

import collapse_probe as cp

MODEL = ["-m", "timm:vit_tiny_patch16_224", "--no-pretrained", "--img-size", "32", "--model-kwargs", "depth=3"]
SHARDS, EACH = 20, 3


def encoded(number):
    pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """SHARDS × EACH images as a folder, as a webdataset and as parquet files."""
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("webdataset")
    root = tmp_path_factory.mktemp("data")
    (root / "parquet").mkdir()
    (root / "shards").mkdir()
    for shard in range(SHARDS):
        names = [f"{shard * EACH + i:04d}.png" for i in range(EACH)]
        images = [encoded(int(name[:4])) for name in names]
        with tarfile.open(root / f"shards/{shard:05d}.tar", "w") as tar:
            for name, content in zip(names, images, strict=True):
                path = root / f"folder/{shard:05d}" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                tar.add(path, name)
        rows = [{"bytes": content, "path": name} for name, content in zip(names, images, strict=True)]
        kinds = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict({"image": rows}, features=kinds).to_parquet(root / f"parquet/train-{shard:05d}.parquet")
    return root


def analysed(data, out, world, workers=0):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    start = ["-m", "torch.distributed.run", f"--nproc-per-node={world}", f"--master-port={port}"] if world > 1 else []
    words = ["-m", "collapse_probe", "analyze", *MODEL, "--data", str(data), "-b", "4", "-j", str(workers), "--device", "cpu"]
    words += ["--null-images", "0", "-q", "-o", str(out)]
    done = subprocess.run([sys.executable, *start, *words], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return cp.Findings.load(out)


@pytest.mark.slow
@pytest.mark.parametrize("address", ["wds/{}/shards", "hfids/{}/parquet"])
def test_a_stream_under_torchrun_is_measured_as_its_folder(data, tmp_path, address):
    folder = analysed(data / "folder", tmp_path / "one", 1)
    stream = analysed(address.format(data), tmp_path / "two", 2, 2)
    assert (folder.run["world_size"], stream.run["world_size"]) == (1, 2)
    assert stream.images["names"].tolist() == folder.images["names"].tolist()
    assert len(set(stream.images["names"].tolist())) == SHARDS * EACH
    assert stream.data["names_sha256"] == folder.data["names_sha256"]
    for name, metric in folder.metrics.items():
        assert np.allclose(stream.metrics[name].values, metric.values, rtol=1e-9, atol=1e-9, equal_nan=True), name
