"""The rows, and downloads from a real server on this machine."""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import threading

import pytest

from jaxtransfer import errors
from jaxtransfer.networks import zoo
from jaxtransfer.weights import catalog, readers

CONTENT = bytes(range(256)) * 400
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
  directory = tmp_path / "kept" / "cache"
  monkeypatch.setenv("JAXTRANSFER_CACHE", str(directory))
  return directory


class Server(http.server.ThreadingHTTPServer):
  """Serves one file, as a hub or plainly, with ranges; can break off."""

  def __init__(self):
    super().__init__(("127.0.0.1", 0), Handler)
    self.content, self.tag = CONTENT, '"one"'
    self.break_after = None
    self.requests = []
    self.address = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
  def log_message(self, *args):
    pass

  def do_HEAD(self):
    self.answer(body=False)

  def do_GET(self):
    self.answer(body=True)

  def answer(self, body):
    server = self.server
    wanted = self.headers.get("Range")
    server.requests.append((self.command, self.path, wanted))
    if self.path == "/away":
      self.send_response(302)
      self.send_header("Location", "http://localhost/file.pth")
      self.end_headers()
      return
    if "missing" in self.path:
      self.send_error(404)
      return
    content, start = server.content, 0
    if wanted and self.headers.get("If-Range", server.tag) == server.tag:
      start = int(re.match(r"bytes=(\d+)-", wanted)[1])
      if start >= len(content):
        self.send_error(416)
        return
    self.send_response(206 if start else 200)
    if start:
      self.send_header(
        "Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"
      )
    self.send_header("Content-Length", str(len(content) - start))
    self.send_header("ETag", server.tag)
    self.send_header("X-Repo-Commit", "c" * 40)
    self.end_headers()
    if body:
      end = server.break_after or len(content)
      self.wfile.write(content[start:end])


@pytest.fixture
def server():
  with Server() as running:
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    yield running
    running.shutdown()
    thread.join()


def row(server, path="file.pth", **changes):
  return catalog.Row(
    "test-row", "resnet18", "file.pth", f"{server.address}/{path}", **changes
  )


def fetch(server, asked):
  return catalog.resolve(asked, loopback=server.address)


@contextlib.contextmanager
def refused(*words):
  with pytest.raises(errors.UsageError) as caught:
    yield
  assert "\n" not in str(caught.value)
  for word in words:
    assert str(word) in str(caught.value), str(caught.value)


def left_in(cache):
  return sorted(
    p.name
    for p in cache.rglob("*")
    if p.is_file() and not p.name.endswith("lock")
  )


def test_rows_are_whole():
  """Names are unique, networks exist, and no source is left open."""
  names = catalog.names()
  assert len(names) == len(set(names))
  for name in names[2:]:
    found = catalog.find(name)
    assert found.network in zoo.list_models()
    assert found.source == "asset" or found.source.startswith(
      ("https://", "hub:", "the ", "Kimia Lab")
    )
    assert all(0 < v < 1 for v in (*found.mean, *found.std))
    if found.sha256:
      assert re.fullmatch(r"[0-9a-f]{8}|[0-9a-f]{64}", found.sha256)
    if found.revision:
      assert re.fullmatch(r"[0-9a-f]{40}", found.revision)


@pytest.mark.parametrize(
  "network", [n for n in zoo.list_models() if not zoo.family(n).small]
)
def test_imagenet_is_the_networks_own(network):
  """torchvision puts the digest's first digits into the file's name."""
  found = catalog.find("imagenet", network)
  assert found.network == network
  start = re.fullmatch(rf"{network}-([0-9a-f]{{8}})\.pth", found.file)[1]
  assert found.sha256.startswith(start)


def test_lookup_failures():
  with refused("retccl", "resnet50", "not of resnet18"):
    catalog.find("retccl", "resnet18")
  with refused("no weights 'kimianett'; did you mean 'kimianet'?"):
    catalog.find("kimianett")
  with refused("no weights 'resnet18.imagenet-v2'"):
    catalog.find("imagenet-v2", "resnet18")
  with refused("resnet50.imagenet"):
    catalog.find("imagenet")
  with refused("'cbr_tiny.imagenet'", "none are published for cbr_tiny"):
    catalog.find("imagenet", "cbr_tiny")
  with refused("'retccl' are of resnet50, not of cbr_tiny"):
    catalog.find("retccl", "cbr_tiny")


def test_histology_networks_say_how_their_features_are_made():
  assert not catalog.find("kimianet").final_relu
  assert not catalog.find("mtdp-densenet121").final_relu
  assert catalog.find("retccl").sha256.startswith("931956f3")


def test_embedded_weights_need_no_network(cache):
  path = catalog.resolve("cifar10-resnet18")
  assert path.stat().st_size <= 6_000_000
  assert path.with_suffix(".md").exists()
  assert "layer3.1.conv2.weight" in readers.open_checkpoint(path)
  assert not cache.exists()


def test_download_is_verified_and_kept(cache, server):
  path = fetch(server, row(server, sha256=DIGEST))
  assert path == cache / "test-row" / "file.pth"
  assert path.read_bytes() == CONTENT
  assert cache.stat().st_mode & 0o777 == 0o700
  fetch(server, row(server, sha256=DIGEST))
  assert len(server.requests) == 1
  assert left_in(cache) == ["file.pth"]


@pytest.mark.parametrize("digest", ["0" * 64, "0" * 8])
def test_wrong_digest_leaves_nothing(cache, server, digest):
  with refused(digest, DIGEST, "published", "removed"):
    fetch(server, row(server, sha256=digest))
  assert left_in(cache) == []


def test_interrupted_download_goes_on(cache, server):
  """The second request asks for what is missing, and only for that."""
  server.break_after = 30_000
  with refused("30,000 of 102,400", "run again"):
    fetch(server, row(server, sha256=DIGEST))
  assert left_in(cache) == ["file.pth.part", "file.pth.part.etag"]
  server.break_after = None
  path = fetch(server, row(server, sha256=DIGEST))
  assert path.read_bytes() == CONTENT
  assert server.requests[-1] == ("GET", "/file.pth", "bytes=30000-")
  assert left_in(cache) == ["file.pth"]


def test_changed_file_is_not_joined_to_an_old_part(cache, server):
  """With no digest to tell, the server's tag must: the part is dropped."""
  server.break_after = 30_000
  with refused("run again"):
    fetch(server, row(server))
  server.break_after = None
  server.content, server.tag = CONTENT[::-1], '"two"'
  assert fetch(server, row(server)).read_bytes() == CONTENT[::-1]


def test_whole_part_that_was_not_placed(cache, server):
  """The process ended between the last byte and the renaming."""
  part = cache / "test-row" / "file.pth.part"
  part.parent.mkdir(parents=True)
  part.write_bytes(CONTENT)
  part.with_name("file.pth.part.etag").write_text('"one"')
  path = fetch(server, row(server, sha256=DIGEST))
  assert path.read_bytes() == CONTENT
  assert left_in(cache) == ["file.pth"]


@pytest.mark.parametrize("known", [None, DIGEST[:8]])
def test_unknown_digest_is_kept_on_first_use(cache, server, known):
  asked = row(server, sha256=known)
  path = fetch(server, asked)
  digests = cache / "digests.json"
  assert json.loads(digests.read_text()) == {"test-row/file.pth": DIGEST}
  fetch(server, asked)
  path.write_bytes(CONTENT + b"x")
  with refused("first use", DIGEST, digests):
    fetch(server, asked)
  assert path.exists()


def test_broken_digests_file_is_named(cache, server):
  fetch(server, row(server))
  (cache / "digests.json").write_text("{")
  with refused("digests.json", "repair"):
    fetch(server, row(server))


def test_placed_file_is_taken_without_network(cache, server):
  path = cache / "test-row" / "file.pth"
  path.parent.mkdir(parents=True)
  path.write_bytes(CONTENT)
  assert fetch(server, row(server, sha256=DIGEST)) == path
  assert server.requests == []


def test_no_network_says_what_to_place_where(cache, server):
  gone = dataclasses.replace(row(server), source="http://127.0.0.1:9/file.pth")
  with refused(cache / "test-row" / "file.pth", "no network"):
    catalog.resolve(gone, loopback="http://127.0.0.1:9")
  with refused("404", cache / "test-row" / "file.pth"):
    fetch(server, row(server, "missing"))
  assert left_in(cache) == []


def test_rows_without_an_address_say_where_to_get_the_file(cache):
  expected = cache / "kimianet" / "KimiaNetPyTorchWeights.pth"
  with refused(expected, "kimialab.uwaterloo.ca", "place it there"):
    catalog.resolve("kimianet")


@pytest.mark.parametrize("path", ["file.pth", "away"])
def test_plain_http_is_refused(cache, server, path):
  """Both as an address and as where a redirect leads."""
  loopback = server.address if path == "away" else None
  with refused("is not https"):
    catalog.resolve(row(server, path), loopback=loopback)
  assert left_in(cache) == []


def test_hub_download(cache, server):
  """huggingface_hub's own protocol, from a server that speaks it."""
  hub = catalog.Row(
    "test.hub",
    "resnet18",
    "model.safetensors",
    "hub:owner/name",
    revision="c" * 40,
    sha256=DIGEST,
  )
  path = fetch(server, hub)
  assert path == cache / "test.hub" / "model.safetensors"
  assert path.read_bytes() == CONTENT
  assert {p for _, p, _ in server.requests} == {
    f"/owner/name/resolve/{'c' * 40}/model.safetensors"
  }
  assert left_in(cache) == ["model.safetensors"]
  path.unlink()
  with refused("removed"):
    fetch(server, dataclasses.replace(hub, sha256="0" * 64))
  assert left_in(cache) == []


def test_hub_failure_says_what_to_place_where(cache, server):
  hub = catalog.Row("test.hub", "resnet18", "missing.bin", "hub:owner/name")
  with refused("owner/name", cache / "test.hub" / "missing.bin"):
    fetch(server, hub)


def test_unwritable_cache_is_named(tmp_path, monkeypatch, server):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("JAXTRANSFER_CACHE", str(tmp_path / "file" / "cache"))
  with refused("JAXTRANSFER_CACHE"):
    fetch(server, row(server))
