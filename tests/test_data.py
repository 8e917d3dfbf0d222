"""The loader of image sets: what it returns, and that no missing or damaged file goes unnoticed."""

import functools
import gzip
import io
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.ndimage

from experiments import data

SHARD = "tiny_shapes-train.array_record-00001-of-00002"


# --- digits


def test_importing_the_module_loads_no_heavy_package(run_python):
    heavy = "{'tensorflow_datasets', 'sklearn', 'PIL', 'jax'}"
    code = f"import sys, experiments.data; print({heavy} & set(sys.modules))"
    assert run_python("-c", code).strip() == "set()"


def test_digits_split_into_two_parts_of_the_whole_set():
    (x, y), (x_test, y_test) = data.load("digits"), data.load("digits", "test")
    assert x.shape == (1437, 8, 8, 1)
    assert x_test.shape == (360, 8, 8, 1)
    assert x.dtype == x_test.dtype == np.float32
    assert y.dtype == y_test.dtype == np.int32
    assert (x.min(), x.max()) == (0, 1)
    whole = np.concatenate([x, x_test]).reshape(1797, 64)
    assert whole.sum() * 16 == 561_718  # the sum over scikit-learn's whole set


def test_digits_are_stratified():
    (_, y), (_, y_test) = data.load("digits"), data.load("digits", "test")
    count, count_test = np.bincount(y), np.bincount(y_test)
    np.testing.assert_allclose(count_test, (count + count_test) * 360 / 1797, atol=1)


def test_digits_are_the_same_each_time():
    for first, second in zip(data.load("digits"), data.load("digits"), strict=True):
        np.testing.assert_array_equal(first, second)


# --- prepared sets, on one of our own


@functools.cache
def tiny_builder():
    """Define, and so register, a set of 20 + 10 images of 4 x 4 pixels of one grey each."""
    import tensorflow_datasets as tfds
    from PIL import Image

    class TinyShapes(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"image": tfds.features.Image(shape=(4, 4, 1)), "label": tfds.features.ClassLabel(num_classes=3)}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
            )

        def _split_generators(self, dl_manager):
            sizes = {"train": 20, "test": 10, "unlabelled": 2}
            return {split: self._generate_examples(n, split) for split, n in sizes.items()}

        def _generate_examples(self, size, split):
            for i in range(size):
                png = io.BytesIO()
                Image.fromarray(np.full((4, 4), i, np.uint8)).save(png, "png")
                png.seek(0)
                yield i, {"image": png, "label": -1 if split == "unlabelled" else i % 3}

    return TinyShapes


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder that holds the tiny set in two shards for each split."""
    import tensorflow_datasets as tfds

    root = tmp_path_factory.mktemp("prepared")
    tiny_builder()(data_dir=root).download_and_prepare(
        file_format="array_record", download_config=tfds.download.DownloadConfig(num_shards=2)
    )
    return root


@pytest.fixture
def copy(prepared, tmp_path):
    """A copy of the tiny set to damage: its folder of files."""
    shutil.copytree(prepared / "tiny_shapes", tmp_path / "tiny_shapes")
    return tmp_path / "tiny_shapes" / "1.0.0"


def assert_tiny(x, y, size):
    assert (x.shape, x.dtype, y.dtype) == ((size, 4, 4, 1), np.float32, np.int32)
    grey = np.rint(x[:, 0, 0, 0] * 255).astype(int)
    expected = np.broadcast_to(grey.astype(np.float32)[:, None, None, None], x.shape) / 255
    np.testing.assert_array_equal(x, expected)
    np.testing.assert_array_equal(y, grey % 3)
    np.testing.assert_array_equal(np.sort(grey), np.arange(size))


@pytest.mark.parametrize(("split", "size"), [("train", 20), ("test", 10)])
def test_a_prepared_set_loads_complete(prepared, split, size):
    assert_tiny(*data.load("tiny_shapes", split, prepared), size)


def test_the_folder_comes_from_the_environment(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert_tiny(*data.load("tiny_shapes"), 20)


def test_the_newest_prepared_version_is_read(tmp_path):
    for version in ("9.0.0", "10.0.0", "incomplete.1_11.0.0"):
        folder = tmp_path / "some_set" / version
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").touch()
    assert data._prepared_folder("some_set", tmp_path) == tmp_path / "some_set" / "10.0.0"


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def flip_bit(path, position=100):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def take_other_split(path):
    shutil.copy(path.with_name(path.name.replace("train", "test")), path)


@pytest.mark.parametrize("damage", [truncate, empty, flip_bit, take_other_split])
def test_a_damaged_shard_is_named(copy, damage):
    damage(copy / SHARD)
    with pytest.raises(ValueError, match="truncated or damaged") as error:
        data.load("tiny_shapes", data_dir=copy.parents[1])
    assert str(copy / SHARD) in str(error.value)


def test_a_missing_shard_is_named(copy):
    (copy / SHARD).unlink()
    with pytest.raises(FileNotFoundError, match=SHARD):
        data.load("tiny_shapes", data_dir=copy.parents[1])


@pytest.mark.parametrize("claimed", [3, 300])
def test_a_shard_of_another_length_than_the_info_says_is_named(copy, claimed):
    info = copy / "dataset_info.json"
    found = len_of_second_shard(copy)
    old = f'"{20 - found}",\n        "{found}"'
    assert old in info.read_text()
    info.write_text(info.read_text().replace(old, f'"{20 - found}",\n        "{claimed}"'))
    with pytest.raises(ValueError, match=f"{SHARD}.*{found} examples instead of {claimed}"):
        data.load("tiny_shapes", data_dir=copy.parents[1])


def len_of_second_shard(folder):
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(folder).info.splits["train"].shard_lengths[1]


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_a_damaged_description_is_named(copy, file):
    truncate(copy / file)
    with pytest.raises(ValueError, match=f"{copy}.*{file}.*truncated or damaged"):
        data.load("tiny_shapes", data_dir=copy.parents[1])


def test_an_undecodable_image_names_the_shard(prepared, monkeypatch):
    monkeypatch.setattr(data, "_FORMATS", ("JPEG",))
    with pytest.raises(ValueError, match=r"tiny_shapes-train.*truncated or damaged.*identify"):
        data.load("tiny_shapes", data_dir=prepared)


def test_a_split_without_labels_is_refused(prepared):
    with pytest.raises(ValueError, match=r"split='unlabelled' .* has no labels; use another"):
        data.load("tiny_shapes", "unlabelled", prepared)


@pytest.mark.parametrize("file_format", ["tfrecord", "parquet"])
def test_other_file_formats_are_refused(copy, file_format):
    info = copy / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", file_format))
    with pytest.raises(ValueError, match=f"{copy} is in {file_format}; .*prepare ArrayRecord"):
        data.load("tiny_shapes", data_dir=copy.parents[1])


def test_a_set_without_class_labels_is_refused(copy):
    features = copy / "features.json"
    text = features.read_text()
    assert "class_label_feature.ClassLabel" in text
    scalar = '"pythonClassName": "tensorflow_datasets.core.features.scalar.Scalar", '
    scalar += '"tensor": {"shape": {}, "dtype": "int64", "encoding": "none"}'
    start = text.index('"label": {') + len('"label": {')
    depth, end = 1, start
    while depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    features.write_text(text[:start] + scalar + text[end - 1 :])
    with pytest.raises(ValueError, match=r"name='tiny_shapes' is no set.*Scalar.*use another set"):
        data.load("tiny_shapes", data_dir=copy.parents[1])


def test_tensorflow_prepares_what_is_not_there_and_prints_nothing(tmp_path, monkeypatch, capfd):
    tiny_builder()
    monkeypatch.setattr(data, "_has_tensorflow", lambda: True)  # this set prepares without it
    assert_tiny(*data.load("tiny_shapes", data_dir=tmp_path), 20)
    assert capfd.readouterr().out == ""
    assert (tmp_path / "tiny_shapes" / "1.0.0" / "dataset_info.json").is_file()


# --- unknown names, splits and folders


@pytest.mark.parametrize("source", ["digits", "archive", "prepared"])
def test_an_unknown_split_lists_those_there_are(source, prepared, tmp_path):
    name = {"digits": "digits", "archive": "mnist", "prepared": "tiny_shapes"}[source]
    (tmp_path / "train-images-idx3-ubyte.gz").touch()
    folder = prepared if source == "prepared" else tmp_path
    with pytest.raises(ValueError, match=r"split='valid' is not in .*use one of") as error:
        data.load(name, "valid", folder)
    assert "'train', 'test'" in str(error.value)


def test_an_unknown_name_suggests_others(tmp_path):
    with pytest.raises(ValueError, match=r"name='cifar_10'.*'digits'.*'cifar10'"):
        data.load("cifar_10", data_dir=tmp_path)


def test_a_set_that_is_nowhere_gives_the_file_the_folder_and_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_has_tensorflow", lambda: False)
    with pytest.raises(FileNotFoundError) as error:
        data.load("cifar10", data_dir=tmp_path)
    message = str(error.value)
    assert str(tmp_path / "cifar10" / "<version>" / "dataset_info.json") in message
    assert "cifar-10-binary.tar.gz" in message
    assert "TFDS_DATA_DIR" in message
    assert f"tfds build cifar10 --data_dir={tmp_path} --file_format=array_record" in message


# --- original archives


def write_idx(path, values):
    path.parent.mkdir(exist_ok=True)
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + values.tobytes()))


def write_tar(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, rows in members.items():
            member = tarfile.TarInfo(name)
            member.size = rows.nbytes
            tar.addfile(member, io.BytesIO(rows.tobytes()))


def random_images(*shape):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, shape, np.uint8), rng.integers(0, 10, shape[0], np.uint8)


@pytest.fixture
def any_checksum(monkeypatch):
    """Take a file's own SHA-256 for the registered one."""
    monkeypatch.setattr(data, "_checksum", lambda *_: "right")

    class Sha256:
        def hexdigest(self):
            return "right"

    monkeypatch.setattr(data.hashlib, "sha256", lambda _: Sha256())


@pytest.mark.parametrize("folder", [".", "fashion_mnist"])
@pytest.mark.parametrize(("split", "prefix"), [("train", "train"), ("test", "t10k")])
@pytest.mark.usefixtures("any_checksum")
def test_idx_archives_load(tmp_path, folder, split, prefix):
    images, labels = random_images(7, 28, 28)
    write_idx(tmp_path / folder / f"{prefix}-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / folder / f"{prefix}-labels-idx1-ubyte.gz", labels)
    x, y = data.load("fashion_mnist", split, tmp_path)
    assert (x.dtype, y.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(x, images[..., None] / np.float32(255))
    np.testing.assert_array_equal(y, labels)


@pytest.mark.usefixtures("any_checksum")
def test_cifar10_archives_load_in_the_order_of_the_batches(tmp_path):
    images, labels = random_images(10, 3, 32, 32)
    rows = np.concatenate([labels[:, None], images.reshape(10, -1)], axis=1)
    order = (3, 1, 2, 5, 4)  # the order in the archive does not matter
    members = {f"cifar-10-batches-bin/data_batch_{i}.bin": rows[2 * i - 2 : 2 * i] for i in order}
    write_tar(tmp_path / "cifar-10-binary.tar.gz", members)
    x, y = data.load("cifar10", "train", tmp_path)
    assert x.flags.c_contiguous
    np.testing.assert_array_equal(x, images.transpose(0, 2, 3, 1) / np.float32(255))
    np.testing.assert_array_equal(y, labels)


@pytest.mark.usefixtures("any_checksum")
def test_cifar100_archives_load_with_the_fine_labels(tmp_path):
    images, labels = random_images(4, 3, 32, 32)
    coarse = np.full((4, 1), 17, np.uint8)
    rows = np.concatenate([coarse, labels[:, None], images.reshape(4, -1)], axis=1)
    write_tar(tmp_path / "cifar-100-binary.tar.gz", {"cifar-100-binary/test.bin": rows})
    x, y = data.load("cifar100", "test", tmp_path)
    np.testing.assert_array_equal(x, images.transpose(0, 2, 3, 1) / np.float32(255))
    np.testing.assert_array_equal(y, labels)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_every_archive_has_a_registered_checksum_and_others_are_refused(name, tmp_path):
    file = data._ARCHIVES[name]["test"][0]
    assert len(data._checksum(name, file)) == 64
    (tmp_path / file).write_bytes(b"not the archive")
    with pytest.raises(ValueError, match=f"{tmp_path / file} is truncated or damaged.*SHA-256"):
        data.load(name, "test", tmp_path)


@pytest.mark.usefixtures("any_checksum")
def test_an_archive_without_its_labels_is_an_error(tmp_path):
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", random_images(7, 28, 28)[0])
    with pytest.raises(FileNotFoundError, match=r"train-labels-idx1-ubyte\.gz of mnist is missing"):
        data.load("mnist", "train", tmp_path)


# --- downsampling and augmentation


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_downsampling_averages_squares(dtype):
    x = np.random.default_rng(0).uniform(size=(3, 6, 4, 2)).astype(dtype)
    small = data.downsample(x, 2)
    assert (small.shape, small.dtype) == ((3, 3, 2, 2), dtype)
    for i, j in np.ndindex(3, 2):
        square = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        np.testing.assert_allclose(small[:, i, j], square.mean(axis=(1, 2)), rtol=1e-6)


def test_downsampling_by_one_changes_nothing():
    x = data.load("digits", "test")[0]
    np.testing.assert_array_equal(data.downsample(x, 1), x)


@pytest.mark.parametrize("factor", [0, 3, -2])
def test_downsampling_needs_a_divisor(factor):
    with pytest.raises(ValueError, match=f"factor={factor} .*8 x 8 pixels; use"):
        data.downsample(np.zeros((1, 8, 8, 1)), factor)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_augmentation_matches_scipy(dtype):
    x = np.random.default_rng(0).uniform(size=(5, 10, 20, 3)).astype(dtype)
    bigger, labels = data.augment(x, np.arange(5), copies=2, seed=3)
    assert (bigger.shape, bigger.dtype) == ((15, 10, 20, 3), dtype)
    np.testing.assert_array_equal(bigger[:5], x)
    np.testing.assert_array_equal(labels, [*range(5)] * 3)
    shifts = np.random.default_rng(3).uniform(-0.1, 0.1, (10, 2)) * (10, 20)
    for i, shift in enumerate(shifts):
        moved = scipy.ndimage.shift(x[i % 5], (*shift, 0), order=1, mode="grid-constant")
        np.testing.assert_allclose(bigger[5 + i], moved, atol=1e-6)


def test_augmentation_is_fixed_by_its_seed():
    x, y = data.load("digits", "test")
    first, second, third = (data.augment(x, y, 1, seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, third)


def test_augmentation_of_many_examples_shifts_each_its_own_way_within_the_range():
    x = np.zeros((1500, 21, 21, 1), np.float32)  # more than one block of the implementation
    x[:, 10, 10] = 1
    moved = data.augment(x, np.zeros(1500), copies=1, seed=0)[0][1500:, :, :, 0]
    np.testing.assert_allclose(moved.sum(axis=(1, 2)), 1, rtol=1e-5)
    for axis in (1, 2):
        distance = moved.sum(axis=3 - axis) @ np.arange(21) - 10
        assert -2.1 <= distance.min() < -2.05
        assert 2.05 < distance.max() <= 2.1
        assert len(np.unique(distance)) > 1400


def test_augmented_images_stay_in_range_and_move_even_if_small():
    x, y = data.load("digits", "test")
    bigger, labels = data.augment(x, y, copies=2, seed=0)
    assert len(bigger) == len(labels) == 3 * 360
    assert bigger.min() >= 0
    assert bigger.max() <= 1
    assert len(np.unique(bigger.reshape(1080, -1), axis=0)) == 1080


def test_no_copies_are_the_originals():
    x, y = data.load("digits", "test")
    bigger, labels = data.augment(x, y, copies=0, seed=0)
    np.testing.assert_array_equal(bigger, x)
    np.testing.assert_array_equal(labels, y)


@pytest.mark.parametrize(
    ("x", "y", "copies", "message"),
    [
        (np.zeros((2, 8, 8)), np.zeros(2), 1, r"x has shape \(2, 8, 8\); give images \(n, height"),
        (np.zeros((2, 8, 8, 1)), np.zeros(3), 1, r"y has shape \(3,\); give one label"),
        (np.zeros((2, 8, 8, 1), np.uint8), np.zeros(2), 1, "x has dtype uint8; convert"),
        (np.zeros((2, 8, 8, 1)), np.zeros(2), -1, "copies=-1 is negative; use"),
    ],
)
def test_augmentation_refuses_what_does_not_fit(x, y, copies, message):
    with pytest.raises(ValueError, match=message):
        data.augment(x, y, copies, seed=0)


# --- the real sets


@functools.cache
def load_real_test_split(name):
    return data.load(name, "test")


def real_folder(name):
    root = Path(os.environ.get("TFDS_DATA_DIR") or "unset")
    folder = data._prepared_folder(name, root)
    if folder is None:
        pytest.skip(f"needs TFDS_DATA_DIR set to a folder with {name} prepared as ArrayRecord")
    return folder


@pytest.mark.parametrize(
    ("name", "shape", "sizes"),
    [
        ("mnist", (28, 28, 1), (60_000, 10_000)),
        ("cifar10", (32, 32, 3), (50_000, 10_000)),
        ("cifar100", (32, 32, 3), (50_000, 10_000)),
    ],
)
def test_the_real_set_loads_complete(name, shape, sizes):
    real_folder(name)
    classes = 100 if name == "cifar100" else 10
    for split, size in zip(("train", "test"), sizes, strict=True):
        x, y = load_real_test_split(name) if split == "test" else data.load(name, split)
        assert (x.shape, x.dtype, y.shape, y.dtype) == ((size, *shape), np.float32, (size,), np.int32)
        assert (x.min(), x.max()) == (0, 1)
        assert (x.reshape(size, -1).max(axis=1) > 0).all()
        count = np.bincount(y, minlength=classes)
        assert len(count) == classes
        # CIFAR's classes are of equal size; MNIST's from 5,421 to 6,742 of the 60,000.
        spread = 0.15 if name == "mnist" else 0
        np.testing.assert_allclose(count, size / classes, rtol=spread)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
def test_the_real_images_and_labels_are_those_that_tensorflow_datasets_reads(name):
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(real_folder(name))
    source = builder.as_data_source("test")
    x, y = load_real_test_split(name)
    for i in (0, 1, 2499, 2500, 7777, 9999):
        np.testing.assert_array_equal(x[i], source[i]["image"] / np.float32(255))
        assert y[i] == source[i]["label"]


@pytest.mark.parametrize("position", [100, 2_000_000, None], ids=["header", "record", "truncated"])
def test_a_damaged_copy_of_a_real_shard_is_named(tmp_path, position):
    folder = tmp_path / "mnist" / "3.0.1"
    shutil.copytree(real_folder("mnist"), folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    shard = folder / "mnist-test.array_record-00000-of-00001"
    truncate(shard) if position is None else flip_bit(shard, position)
    with pytest.raises(ValueError, match=f"{shard} is truncated or damaged"):
        data.load("mnist", "test", tmp_path)
