"""S11: MNIST, Fashion-MNIST and CIFAR-10 in the files of their authors: fetched, found, read."""

import contextlib
import gzip
import hashlib
import math
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is, of how much
CACHE = "ROSETTA_CACHE"  # environment variable: the folder that keeps what was fetched
CLASSES = 10  # in each of the three
GZIP = b"\x1f\x8b"  # first bytes of a gzip file


class Source(NamedTuple):
    """The files of one dataset as they are published, and where they usually lie."""

    title: str
    shape: tuple[int, int, int]  # [H, W, C] of an image
    files: dict[str, str]  # what is fetched: name -> SHA-256
    mirrors: tuple[str, ...]  # where from, in the order in which they are tried
    folders: tuple[str, ...]  # in a --data-dir, the dataset's usual names


class Archive(NamedTuple):
    """Images and labels of one dataset, as its files hold them."""

    train_images: np.ndarray  # [N, H, W, C] uint8
    train_labels: np.ndarray  # [N] uint8
    test_images: np.ndarray  # [M, H, W, C]
    test_labels: np.ndarray  # [M]


IDX = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def _idx(*checksums: str) -> dict[str, str]:
    return dict(zip(IDX, checksums, strict=True))


CIFAR = "cifar-10-binary.tar.gz"
CIFAR_FOLDER = "cifar-10-batches-bin"
CIFAR_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
CIFAR_TEST = "test_batch.bin"
CIFAR_BATCH = 10_000  # images in each of its files
CIFAR_SHAPE = (32, 32, 3)
CIFAR_RECORD = 1 + math.prod(CIFAR_SHAPE)  # a label, then the red, the green, the blue plane

# The checksums stand in two places each: in TensorFlow Datasets (`url_checksums/NAME.txt`), and for
# the first two in torchvision (`prototype/datasets/_builtin/mnist.py`), for CIFAR-10 in the Ruby
# port of torchvision (`datasets/cifar10.rb`). The first mirror of MNIST is torchvision's, the
# second TensorFlow Datasets'. Fashion-MNIST lies in its authors' repository, and where its page
# links to. The page of CIFAR-10 now leads from its first address to its second.
SOURCES = {
    "mnist": Source(
        "MNIST",
        (28, 28, 1),
        _idx(
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
        (
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        ("MNIST/raw", "MNIST", "mnist"),
    ),
    "fashion_mnist": Source(
        "Fashion-MNIST",
        (28, 28, 1),
        _idx(
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
        (
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        ),
        ("FashionMNIST/raw", "FashionMNIST", "Fashion-MNIST", "fashion_mnist", "fashion-mnist"),
    ),
    "cifar10": Source(
        "CIFAR-10",
        CIFAR_SHAPE,
        {CIFAR: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"},
        ("https://www.cs.toronto.edu/~kriz/", "https://cave.cs.toronto.edu/kriz/"),
        (CIFAR_FOLDER, f"cifar10/{CIFAR_FOLDER}", "cifar10", "CIFAR10", "cifar-10", "CIFAR-10"),
    ),
}


# --- fetching ----------------------------------------------------------------------------------


class _Bar:
    """The progress bar that pooch drives, passed on to a Progress."""

    def __init__(self, progress: Progress, what: str) -> None:
        self.progress, self.what, self.done, self.total = progress, what, 0, 0

    def update(self, count: int) -> None:
        self.done += count  # pooch counts whole chunks, so the last one may go beyond the end
        self.progress(self.what, min(self.done, self.total or self.done), self.total or self.done)

    def reset(self) -> None:
        self.done = 0

    def close(self) -> None:
        pass


def _reason(error: BaseException) -> str:
    """What began a chain of errors, in its own words: what the network's layers pass on is long."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return str(error) or type(error).__name__


def fetch(name: str, progress: Progress) -> dict[str, Path]:
    """The files of a dataset, from the cache folder, or else from its mirrors; name -> path.

    What does not have the SHA-256 of SOURCES is never kept. Raises ValueError that says what to
    fetch by hand and from where, ImportError where pooch is missing.
    """
    source = SOURCES[name]
    try:
        import pooch
    except ImportError as error:
        raise ImportError(
            f"{source.title} is fetched with pooch; pip install pooch, or name the folder that "
            "has its files with --data-dir"
        ) from error
    folder = Path(os.environ.get(CACHE) or pooch.os_cache("diffusion-rosetta")).expanduser() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{source.title}: the cache folder {folder} cannot be made ({error.strerror}); set "
            f"{CACHE} to another, or name the folder that has the files with --data-dir"
        ) from error

    def fetch_file(file: str, checksum: str) -> Path:
        failures, what = [], f"fetching {source.title}: {file}"
        if not (folder / file).exists():
            progress(what, 0, 1)  # a mirror that does not answer is waited for
        for mirror in source.mirrors:
            bar = _Bar(progress, what)
            downloader = pooch.HTTPDownloader(progressbar=bar, chunk_size=2**16)
            try:
                return Path(
                    pooch.retrieve(
                        mirror + file, f"sha256:{checksum}", file, folder, downloader=downloader
                    )
                )
            except (OSError, ValueError) as error:
                failures.append(f"from {mirror}: {_reason(error)}")
        raise ValueError(
            f"{source.title}: {file} cannot be fetched {'; '.join(failures)}. Without a network, "
            f"get {', '.join(source.files)} from {source.mirrors[0]} by other means, and name "
            "the folder that has them with --data-dir"
        )

    log = pooch.get_logger()
    level = log.level
    log.setLevel("ERROR")  # it prints; progress is told to the caller
    try:
        return {file: fetch_file(file, checksum) for file, checksum in source.files.items()}
    finally:
        log.setLevel(level)


# --- finding -----------------------------------------------------------------------------------


def _spellings(name: str) -> tuple[str, ...]:
    """The names under which a published file lies on disks: unpacked, or with a dot (`.idx3`)."""
    plain = name.removesuffix(".gz")
    dotted = plain.replace("-idx", ".idx")
    return tuple(dict.fromkeys((plain, name, dotted, f"{dotted}.gz")))


def find(name: str, data_dir: str | Path) -> dict[str, Path]:
    """The files of a dataset in a folder, or in a folder of its usual name therein; name -> path.

    The names are those of `Source.files`, or of the files that CIFAR-10's archive holds. Raises
    ValueError that says what is missing, or that a file is another dataset's.
    """
    source, folder = SOURCES[name], Path(data_dir).expanduser()
    if not folder.is_dir():
        raise ValueError(f"--data-dir {folder} is no folder; name the one that has {source.title}")
    forms = [tuple(source.files)]
    if CIFAR in source.files:
        forms.insert(0, (*CIFAR_TRAIN, CIFAR_TEST))
    partial = ""
    for place in (*(folder / usual for usual in source.folders), folder):
        for form in forms:
            found: dict[str, Path] = {}
            for file in form:
                paths = (place / spelling for spelling in _spellings(file))
                if path := next((path for path in paths if path.is_file()), None):
                    found[file] = path
            if len(found) == len(form):
                _refuse_another(name, found)
                return found
            if found and not partial:
                missing = ", ".join(file for file in form if file not in found)
                partial = f"{place} has {', '.join(found)}, but not {missing}"
    needed = " or ".join(", ".join(form) for form in forms[::-1])
    also = "; the Python version, which is pickled, is not read" if CIFAR in source.files else ""
    raise ValueError(
        f"{source.title}: {partial or f'nothing of it is in {folder}'}; needed are {needed} "
        f"(from {source.mirrors[0]}), in that folder or in its {' or '.join(source.folders)}{also}"
    )


def _refuse_another(name: str, found: dict[str, Path]) -> None:
    """Raise ValueError for a file of MNIST where Fashion-MNIST was asked for, and the reverse.

    Their files have the same names and the same form. An unpacked one cannot be told apart.
    """
    others = [source for key, source in SOURCES.items() if key != name]
    for file, path in found.items():
        candidates = [source for source in others if file in source.files]
        if candidates and path.suffix == ".gz":
            with path.open("rb") as stream:
                checksum = hashlib.file_digest(stream, "sha256").hexdigest()
            for other in candidates:
                if checksum == other.files[file]:
                    raise ValueError(
                        f"{path} is a file of {other.title}, not of {SOURCES[name].title}; "
                        "name another --data-dir, or keep each in a folder of its name"
                    )


# --- reading -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _faults_named(path: Path) -> Iterator[None]:
    """Turn what a damaged file raises into a ValueError that names it."""
    try:
        yield
    # tarfile passes a ValueError on where a header has letters in the place of a number.
    except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
        words = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read: {words}; fetch it again") from error


def _open(path: Path):
    """A stream of the file's bytes, unpacked where it is gzip, whatever its name says."""
    with path.open("rb") as stream:
        packed = stream.read(len(GZIP)) == GZIP
    return gzip.open(path) if packed else path.open("rb")


def read_idx(path: Path, item: tuple[int, ...]) -> np.ndarray:
    """The items of an IDX file of unsigned bytes, [N, *item]; plain or gzip.

    Source: LeCun et al. 1998. Raises ValueError that names the file and what is wrong with it.
    """
    with _faults_named(path), _open(path) as stream:
        data = stream.read()
    magic = bytes([0, 0, 8, 1 + len(item)])  # 8: unsigned bytes; then the number of dimensions
    start = 4 * (2 + len(item))
    if len(data) < start:
        raise ValueError(
            f"{path} has {len(data)} bytes, fewer than the {start} of its header; fetch it again"
        )
    if data[:4] != magic:
        raise ValueError(
            f"{path} begins with {data[:4].hex()}, expected {magic.hex()} (IDX, unsigned bytes, "
            f"{1 + len(item)} dimensions); is it another file?"
        )
    count, *shape = np.frombuffer(data, ">u4", 1 + len(item), offset=4).tolist()
    if tuple(shape) != item:
        raise ValueError(
            f"{path} has images of {' x '.join(map(str, shape))}, expected "
            f"{' x '.join(map(str, item))}; is it another dataset's?"
        )
    needed, there = count * math.prod(item), len(data) - start
    if there != needed:
        fault = "it is cut off" if there < needed else "something else follows"
        raise ValueError(
            f"{path} has {there} bytes after its header, which announces {count} items, so "
            f"{needed} bytes: {fault}; fetch it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(count, *item)


def _checked(images: np.ndarray, labels: np.ndarray, where: Path, label_file: Path):
    """Both, where they fit together; else a ValueError that names the files."""
    if not len(images):
        raise ValueError(f"{where} has no images; fetch it again")
    if len(images) != len(labels):
        raise ValueError(
            f"{where} has {len(images)} images, but {label_file} has {len(labels)} labels; "
            "they must be of the same part of the same dataset"
        )
    if (largest := int(labels.max())) >= CLASSES:
        raise ValueError(
            f"{label_file}: label {largest} at item {int(labels.argmax())} is outside "
            f"0..{CLASSES - 1}; is it another dataset's, or damaged?"
        )
    return images, labels


def _read_mnist(found: dict[str, Path], progress: Progress) -> Archive:
    parts: list[np.ndarray] = []
    for done, (image_name, label_name) in enumerate((IDX[:2], IDX[2:])):
        progress("reading", done, 2)
        images = read_idx(found[image_name], (28, 28))[..., None]
        labels = read_idx(found[label_name], ())
        parts += _checked(images, labels, found[image_name], found[label_name])
    progress("reading", 2, 2)
    return Archive(*parts)


def read_cifar(path: Path, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 32, 32, 3] and labels [N] in the bytes of one of CIFAR-10's binary files.

    Source: Krizhevsky 2009. Raises ValueError that names `path` and what is wrong with it.
    """
    if not 0 < len(data) <= CIFAR_BATCH * CIFAR_RECORD or len(data) % CIFAR_RECORD:
        raise ValueError(
            f"{path} has {len(data)} bytes, expected {CIFAR_BATCH * CIFAR_RECORD}: up to "
            f"{CIFAR_BATCH} whole records of {CIFAR_RECORD}; fetch it again"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, CIFAR_RECORD)
    height, width, channels = CIFAR_SHAPE
    images = records[:, 1:].reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
    return _checked(images, records[:, 0], path, path)


def _member_fault(member: tarfile.TarInfo, wanted: bool) -> str:
    """What is wrong with a member of CIFAR-10's archive; "" where nothing is.

    The length counts for those too that are passed over: tarfile would look for the end of what a
    damaged header announces, however far behind the end of the file that is.
    """
    limit = CIFAR_BATCH * CIFAR_RECORD
    whole = 0 <= member.size <= limit and not member.issparse()
    if not whole or (wanted and not member.isfile()):
        return f"its {Path(member.name).name} is no plain file of at most {limit} bytes"
    return ""


def unpack_cifar(path: Path, progress: Progress) -> dict[str, bytes]:
    """The bytes of CIFAR-10's six files in its archive; name -> bytes.

    Nothing is written to a disk, and members of other names are passed over. Raises ValueError
    where one of the six is missing, is there twice, is no plain file, or is too long.
    """
    names = {f"{CIFAR_FOLDER}/{name}": name for name in (*CIFAR_TRAIN, CIFAR_TEST)}
    found: dict[str, bytes] = {}
    fault = ""
    with _faults_named(path), _open(path) as stream:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                name = names.get(member.name.removeprefix("./"), "")
                fault = _member_fault(member, bool(name))
                if name in found:
                    fault = f"it has {name} twice"
                if fault:
                    break
                if name and (content := archive.extractfile(member)):
                    found[name] = content.read()
                    progress("unpacking", len(found), len(names))
        while not fault and stream.read(2**20):  # gzip compares its own checksum at the end
            pass
    missing = ", ".join(name for name in names.values() if name not in found)
    if fault or missing:
        raise ValueError(f"{path}: {fault or f'it lacks {missing}'}; fetch it again")
    return found


def _read_cifar10(found: dict[str, Path], progress: Progress) -> Archive:
    if CIFAR in found:
        contents = unpack_cifar(found[CIFAR], progress)
        paths = {name: found[CIFAR] / name for name in contents}  # for messages
    else:
        contents, paths = {}, found
        for name, path in found.items():
            with _faults_named(path):
                contents[name] = path.read_bytes()
            progress("reading", len(contents), len(found))
    train = [read_cifar(paths[name], contents[name]) for name in CIFAR_TRAIN]
    images, labels = (np.concatenate(arrays) for arrays in zip(*train, strict=True))
    return Archive(images, labels, *read_cifar(paths[CIFAR_TEST], contents[CIFAR_TEST]))


def load_archive(name: str, data_dir: str | Path | None, progress: Progress) -> Archive:
    """The dataset of this name in SOURCES, fetched where no folder is named.

    Raises ValueError that names the file and what is wrong with it; ImportError without pooch.
    """
    found = fetch(name, progress) if data_dir is None else find(name, data_dir)

    def reading(what: str, done: int, total: int) -> None:
        progress(f"{what} {SOURCES[name].title}", done, total)

    read = _read_cifar10 if name == "cifar10" else _read_mnist
    return read(found, reading)
