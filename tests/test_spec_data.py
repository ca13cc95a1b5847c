"""Datasets: files in the formats of their authors, fetched over a local server, and own images.

Every file is written here, byte by byte or by Pillow; nothing leaves this machine unless
ROSETTA_NETWORK_TESTS=1 asks for the real files.
"""

import gzip
import hashlib
import http.server
import io
import os
import re
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from spec.archives import CIFAR, CIFAR_FOLDER, IDX, SOURCES
from spec.config import CHOICES, config_names, load_config
from spec.data import SHAPES, held_out_rows, load_dataset
from spec.folder import read_image
from spec.noise import uniforms

ROOT = Path(__file__).resolve().parents[1]
BATCHES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


# --- files in their formats ------------------------------------------------------------------


def pixels(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def idx(array):
    """The bytes of an IDX file, as LeCun's page describes it."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">I", n) for n in array.shape)
    return header + array.tobytes()


def mnist_files(seed=0, packed=True):
    """Names and bytes of a small MNIST: 7 images to train on, 3 to test with."""
    result = {}
    for part, count in (("train", 7), ("t10k", 3)):
        images = pixels((count, 28, 28), seed + count)
        images[0, 0, :2] = 0, 255
        labels = np.arange(count, dtype=np.uint8)[::-1]
        result[f"{part}-images-idx3-ubyte.gz"] = idx(images)
        result[f"{part}-labels-idx1-ubyte.gz"] = idx(labels)
    if packed:
        return {name: gzip.compress(data, mtime=0) for name, data in result.items()}
    return {name.removesuffix(".gz"): data for name, data in result.items()}


def cifar_files():
    """Names and bytes of a small CIFAR-10: two images in each file, the planes one by one."""
    result = {}
    for number, name in enumerate(BATCHES):
        data = b""
        for i in range(2):
            image = pixels((32, 32, 3), 10 * number + i)
            planes = [image[..., channel].tobytes() for channel in range(3)]
            data += bytes([(number + i) % 10]) + b"".join(planes)
        result[name] = data
    return result


def tar(members, kind="w:gz"):
    """The bytes of a tar archive of (name, bytes) or (TarInfo, bytes)."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=kind) as archive:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data) if info.isfile() else 0
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def cifar_members():
    return [(f"{CIFAR_FOLDER}/{name}", data) for name, data in cifar_files().items()]


MNIST_BYTES, CIFAR_BYTES = mnist_files(), tar(cifar_members(), "w")


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def same(a, b):
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


# --- reading them ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_files_become_images_and_labels(tmp_path, name):
    data = load_dataset(name, write(tmp_path, mnist_files()))
    for images, labels, count in ((*data[:2], 7), (*data[2:], 3)):
        assert images.shape == (count, 28, 28, 1)
        assert images.dtype == np.float32
        assert images.flags.c_contiguous
        assert labels.dtype == np.int64
        assert labels.tolist() == list(range(count))[::-1]
        assert images[0, 0, :2, 0].tolist() == [-1, 1]
        raw = pixels((count, 28, 28), count)
        raw[0, 0, :2] = 0, 255
        assert np.abs(images[..., 0] - (raw / 127.5 - 1)).max() < 1e-7


@pytest.mark.parametrize(
    "place", [".", "MNIST/raw", "MNIST", "mnist"], ids=lambda place: place.replace("/", "-")
)
@pytest.mark.parametrize("form", ["packed", "plain", "dotted", "packed, by another name"])
def test_mnist_is_found_where_it_usually_lies(tmp_path, place, form):
    files = mnist_files(packed=form.startswith("packed"))
    if form == "dotted":
        files = {name.replace("-idx", ".idx"): data for name, data in files.items()}
    if form == "packed, by another name":  # gzip is told by its first bytes
        files = {name.removesuffix(".gz"): data for name, data in files.items()}
    write(tmp_path / place, files)
    expected = load_dataset("mnist", write(tmp_path / "direct" / "x", mnist_files()))
    assert same(load_dataset("mnist", str(tmp_path)), expected)


def test_the_folder_of_a_datasets_name_goes_first(tmp_path):
    write(tmp_path, mnist_files(seed=5))
    write(tmp_path / "FashionMNIST/raw", mnist_files(seed=9))
    fashion, mnist = load_dataset("fashion_mnist", tmp_path), load_dataset("mnist", tmp_path)
    assert same(fashion, load_dataset("fashion_mnist", tmp_path / "FashionMNIST/raw"))
    assert not same(fashion, mnist)


@pytest.mark.parametrize(
    "form", ["tar.gz", "tar", "dots", "direct", "extracted", "both, and a broken archive"]
)
def test_cifar_is_read_from_its_archive_and_its_files(tmp_path, form):
    if form in ("direct", "extracted", "both, and a broken archive"):
        write(tmp_path / ("" if form == "direct" else CIFAR_FOLDER), cifar_files())
        if form.startswith("both"):
            write(tmp_path, {CIFAR: b"broken"})
    else:
        members = [("readme.html", b"hello"), *cifar_members()[::-1]]
        if form == "dots":
            members = [(f"./{name}", data) for name, data in members]
        name = CIFAR if form != "tar" else CIFAR.removesuffix(".gz")
        write(tmp_path, {name: tar(members, "w" if form == "tar" else "w:gz")})
    data = load_dataset("cifar10", tmp_path)
    assert data.train_images.shape == (10, 32, 32, 3)
    assert data.test_images.shape == (2, 32, 32, 3)
    assert data.train_images.flags.c_contiguous
    assert data.train_labels.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert data.test_labels.tolist() == [5, 6]
    expected = [pixels((32, 32, 3), 10 * number + i) for number in range(6) for i in range(2)]
    got = np.concatenate([data.train_images, data.test_images])
    assert np.abs(got - (np.array(expected) / 127.5 - 1)).max() < 1e-7


# --- files that are not as they should be ------------------------------------------------------

IMAGES, LABELS = IDX[0].removesuffix(".gz"), IDX[1].removesuffix(".gz")


def edit(data, position, value):
    return data[:position] + value + data[position + len(value) :]


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (IMAGES, lambda data: data[:-1], "announces 7 items, so 5488 bytes: it is cut off"),
        (IMAGES, lambda data: data[:10], "has 10 bytes, fewer than the 16 of its header"),
        (IMAGES, lambda data: b"", "has 0 bytes"),
        (IMAGES, lambda data: data + b"x", "5489 bytes after its header.*something else follows"),
        (IMAGES, lambda data: edit(data, 0, b"\x01"), "begins with 01000803, expected 00000803"),
        (IMAGES, lambda data: edit(data, 2, b"\x0d"), "begins with 00000d03"),  # floats
        (IMAGES, lambda data: edit(data, 4, struct.pack(">I", 8)), "announces 8 items"),
        (IMAGES, lambda data: edit(data, 4, struct.pack(">I", 2**32 - 1)), "announces 4294967295"),
        (IMAGES, lambda data: edit(data, 8, struct.pack(">II", 8, 98)), "of 8 x 98, .* 28 x 28"),
        (IMAGES, lambda data: edit(data, 4, bytes(4))[:16], "has no images"),
        (IMAGES, lambda data: idx(pixels((6, 28, 28))), "6 images, but .*labels.* has 7 labels"),
        (LABELS, lambda data: data[:-1], "announces 7 items, so 7 bytes: it is cut off"),
        (
            LABELS,
            lambda data: edit(data, -1 % len(data), b"\x0a"),
            r"label 10 at item 6 is outside",
        ),
        (LABELS, lambda data: idx(pixels((7, 28, 28))), "begins with 00000803, expected 00000801"),
        (IMAGES, lambda data: gzip.compress(data)[:-9], "cannot be read: .*end-of-stream"),
        (IMAGES, lambda data: gzip.compress(data) + b"x", "cannot be read: Not a gzipped file"),
        (IMAGES, lambda data: edit(gzip.compress(data), 0, b"\x1f\x8b\x07"), "cannot be read: Unk"),
        (
            IMAGES,
            lambda data: edit(gzip.compress(data), 10, b"\x07"),
            "cannot be read: .* block type",
        ),
    ],
)
def test_a_wrong_idx_file_is_named(tmp_path, file, change, words):
    files = mnist_files(packed=False)
    write(tmp_path, files | {file: change(files[file])})
    with pytest.raises(ValueError, match=words) as caught:
        load_dataset("mnist", tmp_path)
    assert str(tmp_path / file) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[:-1], "has 6145 bytes, expected 30730000"),
        (lambda data: data + b"x", "has 6147 bytes"),
        (lambda data: b"", "has 0 bytes"),
        (lambda data: data[:3073] * 10_001, "has 30733073 bytes, .*up to 10000 whole records"),
        (lambda data: edit(data, 3073, b"\x63"), r"label 99 at item 1 is outside 0\.\.9"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_wrong_cifar_file_is_named(tmp_path, change, words, packed):
    files = cifar_files()
    files["data_batch_3.bin"] = change(files["data_batch_3.bin"])
    if packed:
        members = [(f"{CIFAR_FOLDER}/{name}", data) for name, data in files.items()]
        write(tmp_path, {CIFAR: tar(members)})
        words = words if len(files["data_batch_3.bin"]) < 10**7 else "no plain file of at most"
    else:
        write(tmp_path, files)
    with pytest.raises(ValueError, match=words) as caught:
        load_dataset("cifar10", tmp_path)
    assert "data_batch_3.bin" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def link(name, kind, target):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (cifar_members()[:-1], "lacks test_batch.bin"),
        (cifar_members() + cifar_members()[:1], "it has data_batch_1.bin twice"),
        (
            [(link(cifar_members()[0][0], tarfile.SYMTYPE, "/etc/passwd"), b"")],
            "its data_batch_1.bin is no plain file",
        ),
        (
            [(link(cifar_members()[0][0], tarfile.LNKTYPE, "../x"), b"")],
            "its data_batch_1.bin is no plain file",
        ),
        # Only the names as published count: these are passed over, wherever they would lead.
        (
            [(f"../{name}", data) for name, data in cifar_members()]
            + [(f"/{name}", data) for name, data in cifar_members()]
            + [(f"{CIFAR_FOLDER}/../{name}", data) for name, data in cifar_members()],
            "lacks data_batch_1.bin, data_batch_2.bin",
        ),
    ],
)
def test_an_archive_that_is_not_cifars_is_refused(tmp_path, members, words):
    inside = write(tmp_path / "a" / "b", {CIFAR: tar(members)})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=words) as caught:
        load_dataset("cifar10", inside)
    assert str(inside / CIFAR) in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def sparse(numbers):
    """A member that says of itself, in letters where numbers belong, where its gaps are."""
    info = tarfile.TarInfo("gaps")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.map": numbers}
    return info


@pytest.mark.parametrize(
    ("first", "words"),
    [
        # tarfile alone would look for the end of the first for ever.
        (tarfile.TarInfo("readme.html"), "its readme.html is no plain file of at most 30730000"),
        (sparse("x"), "cannot be read: "),
    ],
)
def test_a_damaged_header_neither_hangs_nor_goes_unnamed(tmp_path, first, words):
    first.size = 2**60 if first.name == "readme.html" else 0
    header = first.tobuf(tarfile.PAX_FORMAT if first.pax_headers else tarfile.GNU_FORMAT)
    write(tmp_path, {CIFAR: header + CIFAR_BYTES})
    load = f"from spec.data import load_dataset; load_dataset('cifar10', {str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", load], cwd=ROOT, timeout=60, capture_output=True, text=True
    )
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"ValueError: {tmp_path / CIFAR}")
    assert words in said


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-6],  # only gzip's checksum is cut
        lambda data: edit(data, len(data) - 8, bytes(4)),  # only gzip's checksum is wrong
        lambda data: edit(data, len(data) // 2, bytes(64)),
        lambda data: b"<html>404</html>" * 100,
        lambda data: b"",
        lambda data: gzip.compress(b"no archive"),
    ],
)
def test_a_damaged_archive_is_named(tmp_path, damage):
    write(tmp_path, {CIFAR: damage(tar(cifar_members()))})
    with pytest.raises(ValueError, match=r"cannot be read|lacks") as caught:
        load_dataset("cifar10", tmp_path)
    assert str(tmp_path / CIFAR) in str(caught.value)


def images_or_error(*arguments):
    """The training images and "", or else None and the words of the ValueError."""
    try:
        return load_dataset(*arguments).train_images, ""
    except ValueError as error:
        return None, str(error)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_damage_raises_anything_but_a_value_error(tmp_path_factory, data):
    name, files = data.draw(
        st.sampled_from(
            [
                ("mnist", mnist_files(packed=False)),
                ("mnist", MNIST_BYTES),
                ("cifar10", {CIFAR: CIFAR_BYTES}),
                ("cifar10", {CIFAR: gzip.compress(CIFAR_BYTES, 1, mtime=0)}),
            ]
        )
    )
    file = data.draw(st.sampled_from(sorted(files)))
    content = bytearray(files[file])
    header = st.integers(0, min(600, len(content) - 1))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(header | st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    folder = write(tmp_path_factory.mktemp("damaged"), files | {file: bytes(content)})
    images, words = images_or_error(name, folder)
    assert str(folder) in words if images is None else images.shape[1:] == SHAPES[name]


@pytest.mark.parametrize(
    ("name", "files", "words"),
    [
        ("mnist", {}, "nothing of it is in .*needed are train-images.*from https://ossci"),
        ("fashion_mnist", {}, "needed are train-images.*in its FashionMNIST/raw or"),
        (
            "cifar10",
            {},
            r"needed are cifar-10-binary\.tar\.gz or data_batch_1.*pickled, is not read",
        ),
        ("mnist", {IDX[1]: b""}, f"has {IDX[1]}, but not {IDX[0]}, {IDX[2]}, {IDX[3]}"),
        ("cifar10", {"test_batch.bin": b""}, "has test_batch.bin, but not data_batch_1.bin"),
    ],
)
def test_what_is_missing_is_named(tmp_path, name, files, words):
    with pytest.raises(ValueError, match=words) as caught:
        load_dataset(name, write(tmp_path, files))
    assert str(tmp_path) in str(caught.value)


def test_a_data_dir_must_be_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r"--data-dir .*nowhere is no folder"):
        load_dataset("mnist", tmp_path / "nowhere")


def checksums(files):
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def test_the_files_of_another_dataset_are_refused(tmp_path, monkeypatch):
    # Fashion-MNIST's files have the names of MNIST's, and the same form.
    fashion = mnist_files(seed=3)
    monkeypatch.setitem(
        SOURCES, "fashion_mnist", SOURCES["fashion_mnist"]._replace(files=checksums(fashion))
    )
    write(tmp_path, fashion)
    assert len(load_dataset("fashion_mnist", tmp_path).train_images) == 7
    with pytest.raises(ValueError, match=r"gz is a file of Fashion-MNIST, not of MNIST"):
        load_dataset("mnist", tmp_path)


# --- fetching, over a server on this machine ---------------------------------------------------


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.requests.append(self.path)
        if self.server.announce:
            self.send_response(200)
            self.send_header("Content-Length", str(self.server.announce))
            self.end_headers()
            self.wfile.write(b"only this")
        else:
            super().do_GET()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of tmp_path/served; the cache is tmp_path/cache."""
    monkeypatch.setenv("ROSETTA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "served").mkdir()
    handler = partial(Handler, directory=tmp_path / "served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        httpd.requests, httpd.announce = [], 0
        httpd.url = f"http://127.0.0.1:{httpd.server_port}/"
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        yield httpd
        httpd.shutdown()
        thread.join()


@pytest.fixture
def nobody():
    """A URL on this machine at which nobody listens."""
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        port = httpd.server_port
    return f"http://127.0.0.1:{port}/"


def publish(monkeypatch, name, files, *mirrors):
    source = SOURCES[name]._replace(files=checksums(files), mirrors=mirrors)
    monkeypatch.setitem(SOURCES, name, source)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_files_are_fetched_once(tmp_path, server, monkeypatch, capfd, name):
    files = {CIFAR: tar(cifar_members())} if name == "cifar10" else mnist_files()
    publish(monkeypatch, name, files, server.url)
    served = write(tmp_path / "served", files)
    told = []
    data = load_dataset(name, progress=lambda *args: told.append(args))
    assert same(data, load_dataset(name, served))
    assert sorted(server.requests) == sorted(f"/{file}" for file in files)
    assert sorted((tmp_path / "cache" / name).iterdir()) == [
        tmp_path / "cache" / name / file for file in sorted(files)
    ]
    for file, content in files.items():
        steps = [args[1:] for args in told if args[0].endswith(file)]
        assert steps[0] == (0, 1)  # before anything has come
        assert steps[-1] == (len(content), len(content))
        assert all(0 <= done <= total for done, total in steps)
    assert told[-1][0].endswith(f"ing {SOURCES[name].title}")
    assert told[-1][1] == told[-1][2]
    told.clear()
    assert same(load_dataset(name, progress=lambda *args: told.append(args)), data)
    assert len(server.requests) == len(files)
    assert not [args for args in told if args[0].startswith("fetching")]
    assert capfd.readouterr() == ("", "")


def test_the_cache_is_the_users_unless_named(tmp_path, server, monkeypatch):
    import pooch

    monkeypatch.delenv("ROSETTA_CACHE")
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "users" / project)
    publish(monkeypatch, "mnist", mnist_files(), server.url)
    write(tmp_path / "served", mnist_files())
    load_dataset("mnist")
    assert (tmp_path / "users" / "diffusion-rosetta" / "mnist" / IDX[0]).is_file()


def test_a_damaged_file_in_the_cache_is_fetched_again(tmp_path, server, monkeypatch):
    publish(monkeypatch, "mnist", mnist_files(), server.url)
    write(tmp_path / "served", mnist_files())
    write(tmp_path / "cache" / "mnist", {IDX[2]: b"damaged"})
    assert len(load_dataset("mnist").test_images) == 3
    assert (tmp_path / "cache" / "mnist" / IDX[2]).read_bytes() == mnist_files()[IDX[2]]


def test_a_wrong_checksum_is_refused_and_nothing_kept(tmp_path, server, monkeypatch):
    files = mnist_files()
    publish(monkeypatch, "mnist", files, server.url)
    write(tmp_path / "served", files | {IDX[1]: files[IDX[3]]})
    with pytest.raises(ValueError, match=rf"MNIST: {IDX[1]} cannot be fetched from http") as caught:
        load_dataset("mnist")
    for checksum in (checksums(files)[IDX[1]], checksums(files)[IDX[3]]):
        assert checksum in str(caught.value)
    assert [path.name for path in (tmp_path / "cache" / "mnist").iterdir()] == [IDX[0]]


def test_the_next_mirror_is_tried(tmp_path, server, nobody, monkeypatch):
    publish(monkeypatch, "mnist", mnist_files(), nobody, f"{server.url}missing/", server.url)
    write(tmp_path / "served", mnist_files())
    assert len(load_dataset("mnist").train_images) == 7


def test_without_a_network_the_files_and_data_dir_are_named(server, nobody, monkeypatch):
    def look_up(host, *rest, find=socket.getaddrinfo):
        if host == "name.invalid":  # no question leaves this machine
            raise socket.gaierror(-2, "Name or service not known")
        return find(host, *rest)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    publish(monkeypatch, "cifar10", {CIFAR: b""}, nobody, "http://name.invalid/", server.url)
    with pytest.raises(ValueError, match="Without a network, get") as caught:
        load_dataset("cifar10")
    words = str(caught.value)
    assert re.search(rf"from {nobody}: \S+ \S+ .*refused", words)
    assert "from http://name.invalid/: [Errno -2] Name or service not known; from" in words
    assert f"from {server.url}: 404" in words
    assert f"get {CIFAR} from {nobody} by other means" in words
    assert "--data-dir" in words


def test_a_download_that_is_cut_off_is_refused(tmp_path, server, monkeypatch):
    publish(monkeypatch, "cifar10", {CIFAR: b"only this, and more"}, server.url)
    server.announce = 19
    with pytest.raises(ValueError, match=f"{CIFAR} cannot be fetched"):
        load_dataset("cifar10")
    assert not list((tmp_path / "cache" / "cifar10").iterdir())


def test_a_cache_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("ROSETTA_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cache folder .* cannot be made .*set ROSETTA_CACHE"):
        load_dataset("mnist")


@pytest.mark.parametrize(
    ("module", "name", "words"),
    [
        ("pooch", "mnist", "pip install pooch, or name the folder"),
        ("PIL", "folder:x", "pip install pillow"),
        ("sklearn.datasets", "digits", "pip install scikit-learn"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, module, name, words):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=words):
        load_dataset(name)


def test_importing_the_datasets_needs_numpy_alone():
    check = "import sys, spec.data; sys.exit(bool({'PIL', 'pooch', 'sklearn'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, timeout=60).returncode == 0


def test_files_in_a_data_dir_need_no_pooch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    assert len(load_dataset("mnist", write(tmp_path, mnist_files())).train_images) == 7


@pytest.mark.parametrize("name", SOURCES)
def test_the_sources_are_well_formed(name):
    source = SOURCES[name]
    assert all(len(bytes.fromhex(checksum)) == 32 for checksum in source.files.values())
    assert all(url.startswith("http") and url.endswith("/") for url in source.mirrors)
    assert source.mirrors[0].startswith("https:")
    assert len(set(source.files.values())) == len(source.files)


MNIST_COUNTS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]  # of the digits
MIRRORS = [(name, mirror) for name, source in SOURCES.items() for mirror in source.mirrors]


@pytest.mark.skipif(
    os.environ.get("ROSETTA_NETWORK_TESTS") != "1",
    reason="fetches 450 MB; ROSETTA_NETWORK_TESTS=1 asks for it",
)
@pytest.mark.parametrize(("name", "mirror"), MIRRORS)
def test_every_mirror_has_the_real_files(tmp_path, monkeypatch, name, mirror):
    monkeypatch.setenv("ROSETTA_CACHE", str(tmp_path))
    monkeypatch.setitem(SOURCES, name, SOURCES[name]._replace(mirrors=(mirror,)))
    data = load_dataset(name)
    assert len(data.test_images) == 10_000
    counts = {"mnist": MNIST_COUNTS, "fashion_mnist": [6000] * 10, "cifar10": [5000] * 10}
    assert np.bincount(data.train_labels).tolist() == counts[name]
    assert data.train_images.min() == -1
    assert data.train_images.max() == 1
    assert same(data, load_dataset(name, tmp_path / name))


# --- one's own images --------------------------------------------------------------------------


def picture(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def bands(height=20, width=60):
    """Red to the left, green in the middle, blue to the right."""
    image = np.zeros((height, width, 3), np.uint8)
    for channel in range(3):
        image[:, channel * width // 3 : (channel + 1) * width // 3, channel] = 255
    return image


LOSSLESS = [("png", {}), ("PNG", {}), ("bmp", {}), ("webp", {"lossless": True})]
LOSSY = [
    ("webp", {"quality": 95}),
    ("jpg", {"quality": 98}),
    ("JPEG", {"quality": 98}),
    ("gif", {}),
]


@pytest.mark.parametrize(("suffix", "options"), LOSSLESS + LOSSY)
def test_every_format_is_read(tmp_path, suffix, options):
    y, x = np.mgrid[:12, :16]
    image = np.stack([16 * x, 20 * y, 8 * x + 8 * y], axis=-1).astype(np.uint8)
    path = picture(tmp_path / f"a.{suffix}", image, **options)
    got = read_image(path, (12, 16, 3))
    assert got.dtype == np.uint8
    # Of the size that is asked for already: not a pixel is touched.
    assert np.array_equal(got, np.asarray(Image.open(path).convert("RGB")))
    if (suffix, options) in LOSSLESS:
        assert np.array_equal(got, image)


def test_a_suffix_that_lies_does_no_harm(tmp_path):
    path = picture(tmp_path / "a.png", bands())
    path.rename(tmp_path / "a.jpg")
    assert np.array_equal(read_image(tmp_path / "a.jpg", (20, 60, 3)), bands())


def test_an_image_is_cropped_around_its_centre(tmp_path):
    wide, tall = bands(), np.transpose(bands(), (1, 0, 2))
    for i, image in enumerate((wide, tall)):
        got = read_image(picture(tmp_path / f"{i}.png", image), (20, 20, 3))
        assert (got == [0, 255, 0]).all()
    # Height and width apart: a crop of 20 x 40, halved: 5, 10 and 5 columns.
    got = read_image(tmp_path / "0.png", (10, 20, 3)).astype(int)
    for columns, colour in ((slice(0, 5), 0), (slice(5, 15), 1), (slice(15, 20), 2)):
        assert got[:, columns, colour].min() > 220
        assert (got[:, columns].argmax(axis=-1) == colour).all()


def test_resizing_averages(tmp_path):
    y, x = np.mgrid[:256, :256]
    board = (255 * ((x + y) % 2)).astype(np.uint8)  # the nearest pixel would be 0 or 255
    got = read_image(picture(tmp_path / "a.png", board), (8, 8, 1))
    assert np.abs(got.astype(int) - 127.5).max() < 2
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None], 256, axis=0)
    got = read_image(picture(tmp_path / "b.png", ramp), (8, 8, 1))
    assert np.abs(got[0, 1:-1, 0] - (32 * np.arange(1, 7) + 15.5)).max() < 1.5


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_stands_upright(tmp_path, suffix, orientation):
    upright = np.zeros((30, 40, 3), np.uint8)
    upright[:15, :20, 0], upright[:15, 20:, 1], upright[15:, :20, 2] = 255, 255, 255
    turn = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[274] = orientation
    stored = np.ascontiguousarray(turn[orientation](upright))
    path = picture(tmp_path / f"a.{suffix}", stored, exif=exif, quality=95)
    got = read_image(path, (30, 40, 3)).astype(int)
    corners = got[5, 5], got[5, -5], got[-5, 5], got[-5, -5]
    expected = [255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0]
    assert np.abs(np.array(corners) - expected).max() < 12


def test_what_is_transparent_becomes_white(tmp_path):
    colour = np.zeros((4, 6, 4), np.uint8)
    colour[:, :2] = [255, 0, 0, 255]
    colour[:, 2:4] = [255, 0, 0, 0]
    colour[:, 4:] = [0, 0, 0, 102]
    expected = [[255, 0, 0]] * 2 + [[255, 255, 255]] * 2 + [[153, 153, 153]] * 2
    for suffix in ("png", "webp"):
        path = picture(tmp_path / f"a.{suffix}", colour, lossless=True)
        assert read_image(path, (4, 6, 3))[0].tolist() == expected
    grey = picture(tmp_path / "b.png", np.array([[[9, 255], [9, 0]]], np.uint8))
    assert read_image(grey, (1, 2, 1)).ravel().tolist() == [9, 255]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    for suffix in ("gif", "png"):
        palette.save(tmp_path / f"c.{suffix}", transparency=1)
        got = read_image(tmp_path / f"c.{suffix}", (1, 2, 3))
        assert got[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_grey_and_colour_as_asked(tmp_path):
    path = picture(tmp_path / "a.png", bands())
    grey = read_image(path, (20, 60, 1))
    assert grey.shape == (20, 60, 1)
    assert grey[0, [0, 30, 59], 0].tolist() == [76, 150, 29]  # 0.299, 0.587, 0.114
    path = picture(tmp_path / "b.png", np.array([[0, 77, 255]], np.uint8))
    assert read_image(path, (1, 3, 3))[0].tolist() == [[0] * 3, [77] * 3, [255] * 3]
    Image.fromarray(bands()).convert("CMYK").save(tmp_path / "c.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "c.jpg", (20, 60, 3)).astype(int) - bands()).mean() < 4
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1").save(tmp_path / "d.bmp")
    assert read_image(tmp_path / "d.bmp", (1, 2, 1)).ravel().tolist() == [0, 255]


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    deep = np.array([[0, 257, 25700, 65535]], np.uint16)
    path = picture(tmp_path / "a.png", deep)
    assert read_image(path, (1, 4, 1)).ravel().tolist() == [0, 1, 100, 255]
    assert read_image(path, (1, 4, 3))[0, :, 2].tolist() == [0, 1, 100, 255]
    path = picture(tmp_path / "b.png", deep, transparency=25700)
    assert read_image(path, (1, 4, 1)).ravel().tolist() == [0, 1, 255, 255]


def test_the_first_frame_counts(tmp_path):
    frames = [Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (30, 200)]
    for suffix, options in (("gif", {}), ("webp", {"lossless": True}), ("png", {})):
        path = tmp_path / f"a.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        assert (read_image(path, (4, 4, 3)) == 30).all(), suffix
    frames[0].save(tmp_path / "b.jpg", "MPO", save_all=True, append_images=frames[1:])
    assert (read_image(tmp_path / "b.jpg", (4, 4, 3)) == 30).all()


def album(folder, classes, **more):
    """Images whose grey value tells which they are, in subfolders of these sizes."""
    value = 0
    for name, count in classes.items():
        for i in range(count):
            picture(folder / name / f"{i:02}.png", np.full((6, 4), value, np.uint8))
            value += 1
    return folder


def values(images):
    """The grey values that `album` gave."""
    return np.round((images[:, 0, 0, 0] + 1) * 127.5).astype(int).tolist()


def test_subfolders_are_classes_and_a_fifth_of_each_is_held_out(tmp_path):
    album(tmp_path, {"owl": 10, "ant/young": 3, "ant/old": 2, "bee": 20})
    write(tmp_path, {"notes.txt": b"", ".hidden.png": b"", "Thumbs.db": b""})
    write(tmp_path / ".cache", {"a.png": b""})
    write(tmp_path / "empty", {})
    told = []
    data = load_dataset(f"folder:{tmp_path}", None, (6, 4, 1), lambda *args: told.append(args))
    assert data.train_images.shape == (28, 6, 4, 1)
    assert data.train_images.dtype == np.float32
    assert np.bincount(data.train_labels).tolist() == [4, 16, 8]  # ant, bee, owl
    assert np.bincount(data.test_labels).tolist() == [1, 4, 2]
    assert data.test_labels.dtype == np.int64
    of_label = {0: range(10, 15), 1: range(15, 35), 2: range(10)}
    for images, labels in (data[:2], data[2:]):
        assert all(v in of_label[k] for v, k in zip(values(images), labels, strict=True))
    assert sorted(values(data.train_images) + values(data.test_images)) == list(range(35))
    assert same(data, load_dataset(f"folder:{tmp_path}", image_shape=(6, 4, 1)))
    assert told == [(f"reading images of {tmp_path}", i, 35) for i in range(36)]


def test_a_folder_without_subfolders_is_one_class(tmp_path):
    album(tmp_path, {".": 10})
    data = load_dataset(f"folder:{tmp_path}", image_shape=(6, 4, 3))
    assert data.train_images.shape == (8, 6, 4, 3)
    assert data.train_labels.tolist() == [0] * 8
    # S10 and S11: of each class those that come first, sorted by the stream's uniforms.
    expected = sorted(np.argsort(uniforms(0, "split", 0, (10,)))[:2].tolist())
    assert values(data.test_images) == expected


def test_the_share_of_a_class_is_rounded():
    for count, expected in ((1, 0), (2, 0), (3, 1), (7, 1), (8, 2), (100, 20)):
        assert held_out_rows(np.zeros(count, int)).sum() == expected
    rows = held_out_rows(np.array([0, 2, 2, 2, 2, 2, 0]))  # no image of class 1
    assert rows[[0, 6]].sum() == 0
    assert rows.sum() == 1


def test_linked_folders_are_followed_once(tmp_path):
    album(tmp_path / "real", {"owl": 5})
    (tmp_path / "pets").mkdir()
    try:
        (tmp_path / "pets" / "owl").symlink_to(tmp_path / "real" / "owl")
        (tmp_path / "real" / "owl" / "back").symlink_to(tmp_path / "pets")
    except OSError:
        pytest.skip("no symbolic links here")
    data = load_dataset(f"folder:{tmp_path / 'pets'}", image_shape=(6, 4, 1))
    assert sorted(values(data.train_images) + values(data.test_images)) == list(range(5))


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    album(tmp_path / "pets", {"owl": 5})
    assert len(load_dataset("folder:~/pets", image_shape=(6, 4, 1)).test_images) == 1
    write(tmp_path / "data", mnist_files())
    assert len(load_dataset("mnist", "~/data").test_images) == 3


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ({}, "holds no images, nor do its subfolders; read are png, jpg"),
        ({".": 1}, r"has too few images \(1, classes: 1\).*give one class at least 3"),
        ({"a": 2, "b": 2}, r"too few images \(4, classes: 2\)"),
        ({".": 2, "a": 5, "b": 5}, "holds 2 images beside its subfolders a, b, each of which"),
        ({"train/a": 3, "test/a": 3}, r"subfolders test, train, .*folder:.*test"),
        ({"Val": 3}, "subfolders Val, which look like parts of a split"),
    ],
)
def test_a_folder_that_is_no_dataset_is_refused(tmp_path, classes, words):
    with pytest.raises(ValueError, match=words) as caught:
        load_dataset(f"folder:{album(tmp_path, classes)}", image_shape=(6, 4, 1))
    assert str(tmp_path) in str(caught.value)


def test_a_class_may_have_the_name_of_a_part_beside_others(tmp_path):
    album(tmp_path, {"train": 5, "boat": 5})
    assert len(load_dataset(f"folder:{tmp_path}", image_shape=(6, 4, 1)).test_images) == 2


def test_broken_images_are_named_all_at_once(tmp_path):
    album(tmp_path, {"a": 5})
    good = (tmp_path / "a" / "00.png").read_bytes()
    photo = picture(tmp_path / "photo.jpg", pixels((64, 64, 3))).read_bytes()
    (tmp_path / "photo.jpg").unlink()
    write(
        tmp_path / "b",
        {
            "cut.jpg": photo[: len(photo) // 2],
            "empty.gif": b"",
            "half.png": good[: len(good) // 2],
            "text.png": b"hello",
        },
    )
    picture(tmp_path / "b" / "scan.TIFF", pixels((8, 8)))  # sound, but of no format that is read
    with pytest.raises(ValueError, match="5 of 10 images cannot be read") as caught:
        load_dataset(f"folder:{tmp_path}", image_shape=(6, 4, 1))
    words = str(caught.value)
    assert "b/cut.jpg (image file is truncated" in words
    assert "b/half.png (" in words
    for name in ("empty.gif", "scan.TIFF", "text.png"):
        assert f"b/{name} (no PNG, JPEG, BMP, GIF, WEBP image)" in words
    write(tmp_path / "c", {f"{i:03}.png": b"" for i in range(95)})
    with pytest.raises(
        ValueError, match=r"100 of 105 images cannot be read.*; and 90 more"
    ) as caught:
        load_dataset(f"folder:{tmp_path}", image_shape=(6, 4, 1))
    assert len(str(caught.value)) < 1500


def test_an_image_of_absurd_size_is_refused_and_a_large_one_read(tmp_path, monkeypatch):
    album(tmp_path, {".": 4})
    picture(tmp_path / "large.png", np.zeros((30, 50), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_dataset(f"folder:{tmp_path}", image_shape=(6, 4, 1)).train_images) == 4
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"1 of 5 images cannot be read: large.png \(Image size"):
        load_dataset(f"folder:{tmp_path}", image_shape=(6, 4, 1))


SMALL_IMAGES = {
    suffix: (lambda stream: (Image.fromarray(bands(8, 9)).save(stream, kind), stream.getvalue()))(
        io.BytesIO()
    )[1]
    for suffix, kind in (("png", "PNG"), ("jpg", "JPEG"), ("gif", "GIF"), ("bmp", "BMP"))
}


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_broken_image_raises_anything_but_a_value_error(tmp_path_factory, data):
    suffix = data.draw(st.sampled_from(sorted(SMALL_IMAGES)))
    content = bytearray(SMALL_IMAGES[suffix])
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("broken")
    write(folder, {f"{i}.{suffix}": bytes(content) for i in range(3)})
    images, words = images_or_error(f"folder:{folder}", None, (4, 4, 3))
    if images is None:
        assert f"3 of 3 images cannot be read: 0.{suffix}" in words
    else:
        assert images.shape == (2, 4, 4, 3)


# --- asking for a dataset ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("faces",), "'faces' is not available; available are digits, mnist.*folder:PATH"),
        (("folder:",), "names no folder"),
        (("folder:pets",), "needs an image_shape"),
        (("folder:pets", None, (8, 8, 2)), r"image_shape = \[8, 8, 2\] is not .*1 \(grey\) or 3"),
        (("folder:pets", None, (0, 8, 1)), r"image_shape = \[0, 8, 1\]"),
        (("folder:pets", None, (8, 8)), r"image_shape = \[8, 8\]"),
        (("folder:no-pets", None, (8, 8, 1)), "folder no-pets is not there"),
        (("folder:pets", "x", (8, 8, 1)), "is a folder itself; leave --data-dir out"),
        (("digits", "x"), "comes with scikit-learn; leave --data-dir out"),
        (("digits", None, (28, 28, 1)), r"'digits' has images \[8, 8, 1\], not \[28, 28, 1\]"),
        (("cifar10", "x", (28, 28, 1)), r"'cifar10' has images \[32, 32, 3\], not"),
    ],
)
def test_wrong_arguments_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        load_dataset(*arguments)


def test_a_dataset_of_the_shape_that_is_asked_for_is_given():
    pytest.importorskip("sklearn")
    assert same(load_dataset("digits", None, (8, 8, 1)), load_dataset("digits"))


def test_the_digits_are_what_they_were():
    pytest.importorskip("sklearn")
    found = [hashlib.sha256(array.tobytes()).hexdigest()[:8] for array in load_dataset("digits")]
    assert found == ["9e511e8e", "98dffed4", "eab166e7", "aa547071"]


def test_the_configs_fit_their_datasets(tmp_path):
    write(tmp_path / "MNIST", mnist_files())
    write(tmp_path / "FashionMNIST", mnist_files(seed=1))
    write(tmp_path / CIFAR_FOLDER, cifar_files())
    assert (*SHAPES, "folder") == CHOICES["data"]
    checked = set()
    for config in map(load_config, config_names()):
        if config.data in SOURCES:
            data = load_dataset(config.data, tmp_path, config.image_shape)
            assert data.train_images.shape[1:] == config.image_shape
            assert config.num_classes in (0, 10)
            checked.add(config.name)
    assert checked == {"mnist", "fashion_mnist", "cifar10", "ddpm_cifar10"}
