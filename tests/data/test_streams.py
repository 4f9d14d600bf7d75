"""A stream gives every image once, under its own name, on any number of parts, processes and workers, and loses none unsaid."""

import io
import itertools
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import collapse_probe as cp
from collapse_probe.data.coverage import SHARD_BITS, Coverage
from collapse_probe.data.images import batches_of, images_from, open_data, open_set
from collapse_probe.data.preprocessing import Preprocess
from collapse_probe.data.streams.stream import BUFFER, ImageStream, Slice, shared
from collapse_probe.errors import DataError, SettingError

pytest.importorskip("webdataset")
SHARDS = 20


def transform(image):
    return pil_to_tensor(image.resize((2, 2))).float()


PREPROCESS = Preprocess(transform, (2, 2), {})


def encoded(number, kind="PNG", size=(3, 3)):
    stream = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 7)).save(stream, kind)
    return stream.getvalue()


def packed(path, members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(number, key=None):
    key = key or f"{number:06d}"
    return {f"{key}.cls": str(number % 3).encode(), f"{key}.png": encoded(number), f"{key}.json": b"{}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """SHARDS shards of 0 to 8 images each, two of them empty; 88 in all."""
    root, number = tmp_path_factory.mktemp("shards"), 0
    for shard in range(SHARDS):
        members = {}
        for _ in range(0 if shard in (3, 11) else 1 + shard * 5 % 9):
            members |= sample(number)
            number += 1
        packed(root / f"train-{shard:03d}.tar", members)
    return root


@pytest.fixture(scope="module")
def names(folder):
    found = []
    for path in sorted(folder.iterdir()):
        with tarfile.open(path) as tar:
            found += [f"{path.stem}/{name}" for name in tar.getnames() if name.endswith(".png")]
    return found


def read(stream, **share):
    return list(stream.batches(PREPROCESS, **{"batch_size": 4, **share}))


def names_of(got):
    return [name for batch in got for name in batch.names]


def covered(got):
    return Coverage(number for batch in got for number in batch.read)


def test_a_webdataset_is_read_in_its_order_with_classes_and_names(folder, names):
    stream = open_data(f"wds/{folder}")
    assert isinstance(stream, ImageStream)
    assert (stream.count, stream.bundled, stream.shape, stream.notes) == (None, False, None, ())
    got = read(stream)
    assert names_of(got) == names
    assert len(names) == len(set(names)) == 88
    numbers = [int(name[-10:-4]) for name in names]
    assert torch.cat([batch.labels for batch in got]).tolist() == [number % 3 for number in numbers]
    pixels = torch.cat([batch.pixels for batch in got])
    assert pixels[:, 0, 0, 0].tolist() == numbers
    assert [len(batch.names) for batch in got[:-1]] == [4] * (len(got) - 1)


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_image_once_on_any_number_of_processes_and_workers(folder, names, world, workers):
    stream = open_data(f"wds/{folder}")
    shares = [read(stream, rank=rank, world=world, workers=workers) for rank in range(world)]
    assert sorted(name for share in shares for name in names_of(share)) == sorted(names)
    whole = Coverage()
    for share in shares:
        assert whole.overlap(covered(share)) is None
        whole.merge(covered(share))
    assert whole == covered(read(stream))
    assert len(whole.ranges()) == SHARDS - 2


@pytest.mark.parametrize("shards", [0, 1, 2, 5, 7, 20])
def test_shards_are_shared_whole_as_long_as_there_are_enough(shards):
    slices = [Slice(shard) for shard in range(shards)]
    for parts, world, workers in itertools.product((1, 3), (1, 2, 8), (1, 3)):
        places = []
        for part, rank, worker in itertools.product(range(parts), range(world), range(workers)):
            mine = shared(shared(shared(slices, part, parts), rank, world), worker, workers)
            assert sum(each.step == 1 for each in mine) >= shards // parts // world // workers
            places += [(each.shard, place) for each in mine for place in range(60) if each.holds(place)]
        assert sorted(places) == [(shard, place) for shard in range(shards) for place in range(60)]


@pytest.mark.parametrize(("shards", "count"), [(0, 2), (3, 2), (5, 4), (7, 8), (20, 7)])
def test_shares_are_as_large_as_each_other(shards, count):
    shares = [shared([Slice(shard) for shard in range(shards)], index, count) for index in range(count)]
    sizes = [sum(each.holds(place) for each in share for place in range(60)) for share in shares]
    assert max(sizes) - min(sizes) <= shards % count


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("parts", "world", "workers"), [(1, 5, 0), (2, 2, 2), (3, 1, 3), (1, 1, 8)])
def test_fewer_shards_than_readers_are_read_by_stride(tmp_path, count, parts, world, workers):
    for shard in range(count):
        packed(tmp_path / f"{shard}.tar", {k: v for i in range(10) for k, v in sample(10 * shard + i).items()})
    stream = open_data(f"wds/{tmp_path}")
    every = [
        name
        for part, rank in itertools.product(range(1, parts + 1), range(world))
        for name in names_of(read(stream, part=(part, parts), rank=rank, world=world, workers=workers))
    ]
    assert sorted(every) == sorted(names_of(read(stream)))
    assert len(every) == 10 * count


def test_parts_of_other_numbers_of_processes_one_of_them_stopped(folder, names):
    stream, whole, seen = open_data(f"wds/{folder}"), Coverage(), []
    for part, (world, workers) in zip(range(1, 9), itertools.cycle([(1, 0), (2, 0), (3, 1)]), strict=False):
        first = [read(stream, part=(part, 8), rank=rank, world=world, batch_size=2)[:1] for rank in range(world)]
        done = covered(itertools.chain(*first))
        rest = [read(stream, part=(part, 8), rank=rank, world=2, workers=workers, done=done) for rank in range(2)]
        assert done.overlap(covered(itertools.chain(*rest))) is None
        done.merge(covered(itertools.chain(*rest)))
        assert whole.overlap(done) is None
        whole.merge(done)
        seen += names_of(itertools.chain(*first, *rest))
    assert sorted(seen) == sorted(names)
    assert whole == covered(read(stream))


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_run_that_goes_on_reads_what_was_not_read(folder, shuffled):
    stream = open_data(f"wds/{folder}")
    stream = stream.shuffled(3) if shuffled else stream
    whole = read(stream)
    for stopped in (0, 1, 7, len(whole)):
        rest = read(stream, done=covered(whole[:stopped]))
        if not shuffled:
            assert [batch.names for batch in rest] == [batch.names for batch in whole[stopped:]]
        assert sorted(names_of(rest)) == sorted(names_of(whole[stopped:]))


def test_what_is_done_is_passed_over_undecoded(folder, monkeypatch):
    stream = open_data(f"wds/{folder}")
    got = read(stream)
    stream.bits  # noqa: B018
    decoded = []
    monkeypatch.setattr("collapse_probe.data.streams.stream.decode", lambda *_: decoded.append(1))
    assert read(stream, done=covered(got)) == []
    assert not decoded


def test_a_shuffled_stream_gives_every_image_once(folder, names):
    stream = open_data(f"wds/{folder}")
    orders = [names_of(read(stream.shuffled(seed))) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != names
    shares = [names_of(read(stream.shuffled(1), rank=rank, world=2, workers=2)) for rank in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(itertools.chain(*shares)) == sorted(names)
    assert f"shuffle buffer of {BUFFER:,} images" in stream.shuffled(1).notes[0]


def test_a_limit_draws_the_same_images_for_any_number_of_processes(folder, names):
    few = open_data(f"wds/{folder}", limit=20, seed=5)
    assert (few.count, len(few.notes)) == (20, 1)
    assert "20 images drawn under seed 5, out of the first 88" in few.notes[0]
    drawn = names_of(read(few))
    assert len(drawn) == len(set(drawn) & set(names)) == 20
    assert drawn == names_of(read(open_data(f"wds/{folder}", limit=20, seed=5)))
    assert drawn != names_of(read(open_data(f"wds/{folder}", limit=20, seed=6)))
    assert len({name.split("/")[0] for name in drawn}) > 5
    shares = [names_of(read(few, rank=rank, world=3, workers=2)) for rank in range(3)]
    assert sorted(itertools.chain(*shares)) == sorted(drawn)
    assert set(names_of(read(few.subset(5, 1)))) < set(drawn)
    assert few.subset(50) is few
    assert open_data(f"wds/{folder}", limit=500).count == 88
    with pytest.raises(SettingError):
        few.subset(0)


def test_a_limit_reads_no_more_than_the_buffer_needs(tmp_path, monkeypatch):
    monkeypatch.setattr("collapse_probe.data.streams.stream.BUFFER", 4)
    for shard in range(3):
        packed(tmp_path / f"{shard}.tar", {f"{i}.png": encoded(i) for i in range(10)})
    few = open_data(f"wds/{tmp_path}", limit=5)
    assert "out of the first 8 that came by a shuffle buffer of 4 from 3 shards" in few.notes[0]


def test_every_image_is_drawn_as_often(tmp_path):
    for shard in range(4):
        packed(tmp_path / f"{shard}.tar", {f"{i}.png": b"" for i in range(5)})
    stream, counts = open_data(f"wds/{tmp_path}"), np.zeros(20)
    for seed in range(400):
        for number in stream.subset(4, seed).drawn:
            counts[5 * (number >> SHARD_BITS) + number % 5] += 1
    assert (abs(counts - 80) < 5 * np.sqrt(80 * 0.8)).all()


# names, pictures and classes


def test_one_shard_has_the_names_of_its_folder(tmp_path):
    members = {
        "b/x.JPG": encoded(1, "JPEG"),
        "b/x.cls": b"4\n",
        "a/1.seg.png": encoded(9),
        "a/1.png": encoded(2),
        "a/1.txt": b"t",
    }
    path = packed(tmp_path / "one.tar", {f"./{name}": content for name, content in members.items()})
    (batch,) = read(open_data(f"wds/{path}"))
    assert batch.names == ("b/x.JPG", "a/1.png")
    assert batch.pixels[:, 0, 0, 0].tolist() == pytest.approx([1, 2], abs=1)
    assert batch.labels is None
    assert set(batch.names) < set(open_set(path).names)


def test_keys_that_repeat_have_their_shard_before_them(tmp_path):
    for place in ("a/0.tar", "b/0.tar", "b/1.tar"):
        packed(tmp_path / place, {"1.png": encoded(1), "1.cls": b"1", "2.png": encoded(2)})
    assert names_of(read(open_data(f"wds/{tmp_path}/b"))) == ["0/1.png", "0/2.png", "1/1.png", "1/2.png"]
    both = names_of(read(open_data(f"wds/{tmp_path}/{{a,b}}/0.tar")))
    assert both == ["a/0.tar/1.png", "a/0.tar/2.png", "b/0.tar/1.png", "b/0.tar/2.png"]


def test_a_key_that_comes_twice_in_a_shard_is_numbered(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number, name in enumerate(("1.png", "2.png", "1.png")):
            info = tarfile.TarInfo(name)
            info.size = len(encoded(number))
            tar.addfile(info, io.BytesIO(encoded(number)))
    assert names_of(read(open_data(f"wds/{tmp_path}/x.tar"))) == ["1.png", "2.png", "1.png (2)"]
    shares = [names_of(read(open_data(f"wds/{tmp_path}/x.tar"), rank=rank, world=2)) for rank in (0, 1)]
    assert shares == [["1.png", "1.png (2)"], ["2.png"]]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read_is_skipped_named_and_explained(tmp_path, workers):
    members = {"1.png": encoded(1), "2.jpg": b"broken", "3.txt": b"words", "3.cls": b"1", "4.png": encoded(4)}
    got = read(open_data(f"wds/{packed(tmp_path / 'x.tar', members)}"), workers=workers)
    skipped = dict(pair for batch in got for pair in batch.skipped)
    assert skipped.keys() == {"2.jpg", "3"}
    assert "UnidentifiedImageError" in skipped["2.jpg"]
    assert skipped["3"] == "no picture among its files (txt, cls)"
    assert sorted(names_of(got)) == ["1.png", "4.png"]
    assert covered(got) == Coverage(range(4))


def test_links_are_named_not_followed(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (("1.png", tarfile.REGTYPE), ("2.png", tarfile.SYMTYPE), ("3.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "1.png" if kind != tarfile.REGTYPE else ""
            info.size = len(encoded(1)) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(encoded(1)))
    (batch,) = read(open_data(f"wds/{tmp_path}/x.tar"))
    assert (batch.names, [name for name, _ in batch.skipped]) == (("1.png",), ["2.png", "3.png"])


def test_deep_greys_are_read_as_in_a_folder(tmp_path):
    content = io.BytesIO()
    Image.fromarray(np.full((4, 4), 3000, dtype=np.uint16)).save(content, "PNG")
    (tmp_path / "f").mkdir()
    bright = io.BytesIO()
    Image.fromarray(np.full((4, 4), 60000, dtype=np.uint16)).save(bright, "PNG")
    (tmp_path / "f/1.png").write_bytes(content.getvalue())
    (tmp_path / "f/2.png").write_bytes(bright.getvalue())
    path = packed(tmp_path / "x.tar", {"1.png": content.getvalue(), "2.png": bright.getvalue()})
    (mine,), (other,) = read(open_data(f"wds/{path}")), [*batches_of(open_data(tmp_path / "f"), PREPROCESS, 4)]
    assert mine.names == other.names
    assert torch.equal(mine.pixels, other.pixels)
    assert mine.remarks == other.remarks


# addresses


def test_addresses_of_shards(folder, names, tmp_path, monkeypatch):
    half = [name for name in names if name < "train-010"]
    for address in (
        f"{folder}/train-{{000..009}}.tar",
        f"{folder}/train-00?.tar",
        f"{folder}/train-{{000..004}}.tar::{folder}/train-{{005..009}}.tar",
    ):
        assert names_of(read(open_data(f"wds/{address}"))) == half
    lines = "\n".join(["# shards", *(os.path.relpath(folder / f"train-{i:03d}.tar", tmp_path) for i in range(10))])
    (tmp_path / "list.txt").write_text(lines)
    assert names_of(read(open_data(f"wds/{tmp_path}/list.txt"))) == half
    assert names_of(read(open_data(f"wds/pipe:cat {folder}/train-{{000..009}}.tar"))) == half
    monkeypatch.setenv("WDS_PLACE", str(folder))
    assert names_of(read(open_data("wds/${PLACE}/train-{000..009}.tar"))) == half


def test_splits_of_shards(folder, tmp_path):
    parts = {"train": range(10), "validation": range(10, 20)}
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    listed = {name: {"filenames": [f"train-{i:03d}.tar" for i in numbers]} for name, numbers in parts.items()}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": listed}))
    stream = open_data(f"wds/{tmp_path}")
    assert stream.notes == ("the split validation of train, validation",)
    assert stream.shards.names == tuple(f"train-{i:03d}" for i in range(10, 20))
    assert open_data(f"wds/{tmp_path}", split="train").shards.names[0] == "train-000"
    with pytest.raises(DataError, match="has no split 'test'; it has train, validation"):
        open_data(f"wds/{tmp_path}", split="test")
    with pytest.raises(DataError, match="leave --split out"):
        open_data(f"wds/{folder}", split="val")


def test_compressed_shards(tmp_path):
    members = {f"{i}.png": encoded(i) for i in range(5)}
    path = packed(tmp_path / "x.tar.gz", members, "w:gz")
    assert names_of(read(open_data(f"wds/{path}"))) == [*members]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"cannot read shard x of .* to its end"):
        read(open_data(f"wds/{path}"))


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [512 * 5 + 20, 512 * 4, 512 * 4 + 100, 512 * 5])
@pytest.mark.parametrize("how", ["", "pipe:cat "])
def test_a_cut_shard_is_an_error_that_names_it(tmp_path, size, workers, how):
    """At any place, also between two files, where tarfile takes it for the end."""
    for name in ("a", "b", "c"):
        packed(tmp_path / f"{name}.tar", {f"{i}.png": encoded(i) for i in range(4)})
    cut(tmp_path / "b.tar", size)
    with pytest.raises(DataError, match=r"cannot read shard b of wds/.* to its end") as caught:
        read(open_data(f"wds/{how}{tmp_path}/{{a,b,c}}.tar"), workers=workers)
    assert "\n" not in str(caught.value)


def test_two_tars_in_one_file_are_an_error(tmp_path):
    """tarfile and webdataset would read the first alone."""
    one, two = (packed(tmp_path / f"{i}.tar", {f"{i}.png": encoded(i)}) for i in (1, 2))
    both = tmp_path / "both.tar"
    both.write_bytes(one.read_bytes() + two.read_bytes())
    for how in ("", "pipe:cat "):
        with pytest.raises(DataError, match=r"cannot read shard both .*another archive begins behind its end mark"):
            read(open_data(f"wds/{how}{both}"))


def test_damaged_and_missing_shards_are_errors_that_name_them(tmp_path):
    path = packed(tmp_path / "x.tar", {f"{i}.png": encoded(i) for i in range(4)})
    content = bytearray(path.read_bytes())
    content[1024 + 150] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read shard x .*header at byte 1,024 is damaged"):
        read(open_data(f"wds/{path}"))
    with pytest.raises(DataError, match=r"1 of 2 shards are not there, the first: .*absent"):
        open_data(f"wds/{tmp_path}/{{x,absent}}.tar")
    with pytest.raises(DataError, match="is given twice"):
        open_data(f"wds/{path}::{path}")
    for address in ("absent", "absent.tar", "*.nothing"):
        with pytest.raises(DataError, match="there is no shard"):
            open_data(f"wds/{tmp_path}/{address}")
    (tmp_path / "list.txt").write_text("pipe:rm -rf /nothing")
    with pytest.raises(DataError, match="only an address that you type yourself"):
        open_data(f"wds/{tmp_path}/list.txt")
    with pytest.raises(DataError, match="cannot read shard"):
        read(open_data("wds/pipe:false"))


def test_a_stream_is_refused_where_images_are_read_by_number(folder):
    with pytest.raises(DataError, match=r"is a stream.*give a folder"):
        open_set(f"wds/{folder}")


def test_settings_that_are_impossible_are_refused(folder):
    stream = pickle.loads(pickle.dumps(images_from(f"wds/{folder}")))
    for share in ({"batch_size": 0}, {"workers": -1}, {"rank": 2, "world": 2}, {"part": (3, 2)}):
        with pytest.raises(SettingError):
            stream.batches(PREPROCESS, **{"batch_size": 4, **share})


def test_no_readable_image_is_an_error(tmp_path):
    path = packed(tmp_path / "x.tar", {"1.png": b"broken", "2.png": b""})
    with pytest.raises(DataError, match=r"no image of .* can be read: 2 of 2 failed, for example 1.png"):
        read(open_data(f"wds/{path}"))


# the verbs


def test_a_stream_is_measured_as_the_same_images_in_a_folder(tmp_path):
    from factories import small_vit

    for shard in range(3):
        members = {f"{i}.png": encoded(50 * shard + 10 * i, size=(64, 64)) for i in range(4)}
        packed(tmp_path / f"shards/s{shard}.tar", members)
        for name, content in members.items():
            path = tmp_path / f"folder/s{shard}/{name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    model = small_vit(depth=2)
    settings = {"metrics": ["attention-similarity", "attention-entropy"], "batch_size": 4, "gallery_images": 0}
    stream, folder = (
        cp.analyze(model, f"{how}{tmp_path}/{where}", **settings) for how, where in (("wds/", "shards"), ("", "folder"))
    )
    assert stream.data["names_sha256"] == folder.data["names_sha256"]
    assert stream.data["address"] == f"wds/{tmp_path}/shards"
    for name, result in folder.metrics.items():
        assert np.array_equal(stream.metrics[name].values, result.values)
    few = cp.analyze(model, f"wds/{tmp_path}/shards", limit=5, **settings)
    assert few.data["images"] == 5
    assert any("5 images drawn under seed 0" in note for note in few.run["notes"])
    both = cp.compare({"a": model, "b": model}, f"wds/{tmp_path}/shards", null_images=0, **settings)
    assert both.subjects["b"].data["images"] == 12


def test_a_run_that_may_stop_reads_a_stream_in_random_order_and_says_so(folder):
    from factories import small_vit

    settings = {"metrics": ["attention-similarity"], "batch_size": 8, "gallery_images": 0, "null_images": 0}
    found = cp.analyze(small_vit(depth=2), f"wds/{folder}", until_ci=10, **settings)
    names = found.images["names"].tolist()
    assert found.run["until_ci"]["images"] == len(names) == 32
    assert names != names_of(read(open_data(f"wds/{folder}")))[:32]
    assert any("read in the order of seed 0, by a shuffle buffer of 1,000" in note for note in found.run["notes"])
