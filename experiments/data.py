"""Image sets as NumPy arrays: scikit-learn's digits, and image sets of tensorflow-datasets by name.

TensorFlow is needed only to prepare a set that is not on this machine in any form. The heavy
packages are imported where they are used: importing this module is quick.
"""

import contextlib
import difflib
import gzip
import hashlib
import importlib.util
import io
import os
import re
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

# The original archives: IDX files of images and of labels, or one archive with members of CIFAR's.
_IDX = {
    "train": ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"],
    "test": ["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"],
}
_CIFAR10 = {"train": ["cifar-10-binary.tar.gz"], "test": ["cifar-10-binary.tar.gz"]}
_CIFAR100 = {"train": ["cifar-100-binary.tar.gz"], "test": ["cifar-100-binary.tar.gz"]}
_ARCHIVES = {"mnist": _IDX, "fashion_mnist": _IDX, "cifar10": _CIFAR10, "cifar100": _CIFAR100}
_MEMBERS = {
    ("cifar10", "train"): [f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)],
    ("cifar10", "test"): ["cifar-10-batches-bin/test_batch.bin"],
    ("cifar100", "train"): ["cifar-100-binary/train.bin"],
    ("cifar100", "test"): ["cifar-100-binary/test.bin"],
}
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # what Pillow calls this many channels
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # letting Pillow try all it knows is slow


def load(name: str, split: str = "train", data_dir: str | Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Load a split: images, float32 (n, height, width, channels) in [0, 1]; labels, int32 (n,).

    name: `digits`, which scikit-learn carries, or a set of tensorflow-datasets such as `mnist`,
        `cifar10` or, with a configuration, `emnist/letters`. A set is taken from `data_dir`: as
        prepared ArrayRecord in `<name>/<version>/`; else, for (Fashion-)MNIST and CIFAR, from its
        original archives in `<name>/` or beside it; else TensorFlow downloads and prepares it.
    split: `train`, `test`, or another one that the set has.
    data_dir: by default `$TFDS_DATA_DIR`, else the default folder of tensorflow-datasets.

    The order is that of the source: prepared sets were shuffled once, archives never were.
    ValueError: unknown name or split, no images of one size with labels, or a truncated or damaged
    file, which the message names. FileNotFoundError: the set or a part of it is not in `data_dir`.
    """
    if name == "digits":
        return _load_digits(split)
    default = os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets"
    root = Path(data_dir or default)
    folder = _prepared_folder(name, root)
    if folder is None and _has_archives(name, root):
        images, labels = _read_archives(name, split, root)
    else:
        images, labels = _read_prepared(folder or _prepare(name, root), split)
    return np.divide(images, 255, dtype=np.float32, order="C"), labels.astype(np.int32)


def downsample(x: np.ndarray, factor: int) -> np.ndarray:
    """Average squares of factor x factor pixels.

    x: images (n, height, width, channels); the result is (n, height / factor, width / factor,
        channels) of the same dtype.
    factor: divides height and width, else ValueError.
    """
    _check_images(x)
    n, height, width, channels = x.shape
    if factor < 1 or height % factor or width % factor:
        raise ValueError(
            f"factor={factor} does not divide images of {height} x {width} pixels; "
            "use a common divisor of the two sides."
        )
    squares = x.reshape(n, height // factor, factor, width // factor, factor, channels)
    return squares.mean(axis=(2, 4), dtype=x.dtype)


def augment(x: np.ndarray, y: np.ndarray, copies: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the originals, then `copies` times all of them, each image shifted at random.

    x: images, floats (n, height, width, channels).
    y: labels (n,).
    copies: 0 or more; the result has (1 + copies) n images and labels, dtypes as given.
    seed: fixes the shifts, uniform in +-10 % of the height and of the width, with linear
        interpolation, so that small images move too; zeros come in at the edges.

    ValueError: shapes that do not match, images that are no floats, or negative `copies`.
    """
    _check_images(x)
    if y.shape != x.shape[:1]:
        raise ValueError(f"y has shape {y.shape}; give one label for each of the {len(x)} images.")
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"x has dtype {x.dtype}; convert it to floats, such as np.float32.")
    if copies < 0:
        raise ValueError(f"copies={copies} is negative; use 0 or more.")
    n, height, width, _ = x.shape
    shifts = np.random.default_rng(seed).uniform(-0.1, 0.1, (copies * n, 2)) * (height, width)
    out = np.empty(((1 + copies) * n, *x.shape[1:]), x.dtype)
    out[:n] = x
    for start in range(n, len(out), 1000):  # a thousand at once: the temporary arrays stay small
        index = np.arange(start, min(start + 1000, len(out)))
        down, right = shifts[index - n].T
        moved = _shift_down(x[index % n], down)
        out[index] = _shift_down(moved.swapaxes(1, 2), right).swapaxes(1, 2)
    return out, np.tile(y, 1 + copies)


def _shift_down(x: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Move each image down by its own distance in pixels."""
    origin = np.arange(x.shape[1]) - distance[:, None]  # each row comes from between two old rows
    above = np.floor(origin).astype(int)

    def rows(index: np.ndarray, weight: np.ndarray) -> np.ndarray:
        inside = (index >= 0) & (index < x.shape[1])
        weight = np.where(inside, weight, 0).astype(x.dtype)[:, :, None, None]
        return weight * x[np.arange(len(x))[:, None], np.where(inside, index, 0)]

    return rows(above, above + 1 - origin) + rows(above + 1, origin - above)


def _check_images(x: np.ndarray) -> None:
    if x.ndim != 4:
        raise ValueError(f"x has shape {x.shape}; give images (n, height, width, channels).")


def _check_split(name: object, split: str, splits: list[str]) -> None:
    if split not in splits:
        raise ValueError(f"split={split!r} is not in {name}; use one of {splits}.")


def _damaged(path: str | Path, reason: object) -> ValueError:
    return ValueError(f"{path} is truncated or damaged: {reason}; replace it by a good copy.")


def _load_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    _check_split("digits", split, ["train", "test"])
    bunch: Any = load_digits()
    images = (bunch.images[..., None] / 16).astype(np.float32)
    labels = bunch.target.astype(np.int32)
    # The seed belongs to the definition of the set: every experiment sees the same two parts.
    parts: Any = train_test_split(images, labels, test_size=360, random_state=0, stratify=labels)
    return (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])


# --- 1. prepared by tensorflow-datasets as ArrayRecord


def _prepared_folder(name: str, root: Path) -> Path | None:
    """The folder of the newest prepared version, if there is one."""
    folders = [path.parent for path in (root / name).glob("*/dataset_info.json")]
    versions = [folder for folder in folders if re.fullmatch(r"\d+\.\d+\.\d+", folder.name)]
    return max(versions, key=lambda f: [int(part) for part in f.name.split(".")], default=None)


def _read_prepared(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read uint8 images and labels, shard by shard, so that an error can name the file."""
    import tensorflow_datasets as tfds

    builder = _open_builder(folder)
    info = builder.info
    _check_split(folder, split, list(info.splits))
    image, label = _feature_keys(info)
    # Images are decoded here: faster than in tensorflow-datasets, which also asks for OpenCV.
    source = builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
    size = info.splits[split].num_examples
    if len(source) != size:
        raise ValueError(f"{folder} holds {len(source)} of {size} examples; prepare it again.")
    images = np.empty((size, *info.features[image].shape), np.uint8)
    labels = np.empty(size, np.int32)
    start = 0
    for shard in info.splits[split].file_instructions:
        stop = start + shard.take
        _check_shard(Path(shard.filename), shard.examples_in_shard)
        try:
            for i, example in enumerate(source.__getitems__(range(start, stop)), start):
                images[i], labels[i] = _decode(example[image], images.shape[1:]), example[label]
        except Exception as error:  # of ArrayRecord or of a codec; none of them names the file
            raise _damaged(shard.filename, error) from error
        start = stop
    if (labels < 0).any():
        raise ValueError(f"split={split!r} of {folder} has no labels; use another split.")
    return images, labels


def _open_builder(folder: Path) -> Any:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # of tensorflow-datasets, protobuf or json
        raise _damaged(f"{folder}/dataset_info.json or features.json", error) from error
    found: Any = builder.info.file_format
    if found != tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(f"{folder} is in {found.value}; delete it and prepare ArrayRecord instead.")
    return builder


def _feature_keys(info: Any) -> tuple[str, str]:
    """The keys of the image and of the label in an example."""
    import tensorflow_datasets as tfds

    match info.supervised_keys:
        case (str(image), str(label)) if (
            isinstance(info.features[image], tfds.features.Image)
            and isinstance(info.features[label], tfds.features.ClassLabel)
            and None not in info.features[image].shape
            and info.features[image].np_dtype == np.uint8
        ):
            return image, label
    raise ValueError(
        f"name={info.name!r} is no set of 8-bit images of one size with a class label, it holds "
        f"{dict(info.features or {})}; use another set, such as 'mnist'."
    )


def _check_shard(path: Path, size: int) -> None:
    """Compare the file with the info: surplus records would go unnoticed."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy it there or prepare the set again.")
    try:
        found = len(ArrayRecordDataSource(str(path)))
    except RuntimeError as error:
        raise _damaged(path, error) from error
    if found != size:
        raise _damaged(path, f"it holds {found} examples instead of {size}")


def _decode(image: bytes, shape: tuple[int, ...]) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(image), formats=_FORMATS) as decoded:
        return np.asarray(decoded.convert(_MODES[shape[-1]])).reshape(shape)


# --- 2. the original archives


def _archive_paths(name: str, file: str, root: Path) -> list[Path]:
    # MNIST and Fashion-MNIST give their files the same names: <root>/<name>/ keeps them apart.
    return [root / name / file, root / file]


def _has_archives(name: str, root: Path) -> bool:
    files = [file for files in _ARCHIVES.get(name, {}).values() for file in files]
    return any(path.is_file() for file in files for path in _archive_paths(name, file, root))


def _read_archives(name: str, split: str, root: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read uint8 images and labels; the checksums vouch for the lengths."""
    _check_split(name, split, list(_ARCHIVES[name]))
    contents = [_verified(name, file, root) for file in _ARCHIVES[name][split]]
    if (name, split) in _MEMBERS:
        return _parse_cifar(contents[0], _MEMBERS[name, split])
    return _parse_idx(contents[0])[..., None], _parse_idx(contents[1])


def _verified(name: str, file: str, root: Path) -> bytes:
    """The content of an archive whose SHA-256 is the one that tensorflow-datasets registers."""
    path = next((p for p in _archive_paths(name, file, root) if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{file} of {name} is missing; put it into {root / name}.")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != _checksum(name, file):
        raise _damaged(path, f"its SHA-256 {found} is not that of {name}")
    return content


def _checksum(name: str, file: str) -> str:
    import tensorflow_datasets as tfds

    infos: Any = tfds.builder_cls(name).url_infos
    return next(info.checksum for info in infos.values() if info.filename == file)


def _parse_idx(content: bytes) -> np.ndarray:
    data = gzip.decompress(content)
    rank = data[3]  # after two zeros and a code for the dtype, here always bytes
    shape = np.frombuffer(data, ">i4", count=rank, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _parse_cifar(content: bytes, members: list[str]) -> tuple[np.ndarray, np.ndarray]:
    found = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for member in tar:  # in the archive's order: going back would decompress it again
            if member.name in members and (stream := tar.extractfile(member)):
                found[member.name] = stream.read()
    data = np.frombuffer(b"".join(found[member] for member in members), np.uint8)
    # Each row: CIFAR-100's coarse label, the label, and 3 x 32 x 32 pixels.
    rows = data.reshape(-1, 3074 if "100" in members[0] else 3073)
    return rows[:, -3072:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, -3073]


# --- 3. not here yet


def _prepare(name: str, root: Path) -> Path:
    """Download and prepare a set with TensorFlow; return its folder."""
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    if name.split("/")[0] not in known:
        close = difflib.get_close_matches(name, known) or ["mnist", "cifar10"]
        raise ValueError(
            f"name={name!r} is no set of tensorflow-datasets and not prepared in {root / name}; "
            f"use 'digits' or a name such as {close}."
        )
    if not _has_tensorflow():
        raise _absent(name, root)
    builder = tfds.builder(name, data_dir=root, file_format="array_record")
    with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the experiment
        builder.download_and_prepare(file_format="array_record")
    return Path(builder.data_path)


def _has_tensorflow() -> bool:
    return importlib.util.find_spec("tensorflow") is not None


def _absent(name: str, root: Path) -> FileNotFoundError:
    files = sorted({file for files in _ARCHIVES.get(name, {}).values() for file in files})
    archives = f"or put {files} into {root / name}; " if files else ""
    return FileNotFoundError(
        f"{root / name}/<version>/dataset_info.json is missing. Set TFDS_DATA_DIR or data_dir to a "
        f"folder that holds {name} prepared as ArrayRecord; {archives}or install TensorFlow, here "
        "or on another machine from which you copy the folder, and run "
        f"`tfds build {name} --data_dir={root} --file_format=array_record`."
    )
