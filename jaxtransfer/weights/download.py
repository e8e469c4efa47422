"""Fetches published files: whole and verified, or not at all."""

import http.client
import json
import os
import pathlib
import shutil
import ssl
import urllib.error
import urllib.parse
import urllib.request
from typing import IO

import huggingface_hub

from jaxtransfer import errors, files, progress

_CHUNK = 2**20
_TIMEOUT_SECONDS = 30


def fetch(
  path: pathlib.Path,
  source: str,
  *,
  revision: str | None = None,
  sha256: str | None = None,
  loopback: str | None = None,
) -> pathlib.Path:
  """Returns `path`, after downloading it if need be, with its digest checked.

  An interrupted download goes on where it stopped. A file whose digest is not
  known is stored with the digest it has on first use, in `digests.json` two
  levels above it, and checked against that from then on.

  Args:
    path: `<cache>/<row>/<file>`; where the file is, or is to be.
    source: an https URL, `hub:owner/repository`, or a sentence that says where
      people get the file.
    revision: the hub commit.
    sha256: the whole digest, or its beginning, or None.
    loopback: the address of a server on 127.0.0.1 that stands for the hub,
      and permits plain http from it: for tests.

  Raises:
    UsageError: the file cannot be had, or is not the published one; nothing is
      left in its place.
  """
  cache = path.parent.parent
  try:
    # A cache that others keep, filled and read-only, needs no lock.
    if path.exists():
      return _verify(path, path, sha256)
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.mkdir(exist_ok=True)
    with files.lock(path.parent / ".lock", wait=True):
      if path.exists():
        return _verify(path, path, sha256)
      if source.startswith("hub:"):
        arrived = _from_hub(path, source[4:], revision, loopback)
      elif source.startswith(("https://", "http://")):
        arrived = _from_url(path, source, loopback)
      else:
        raise errors.UsageError(
          f"{path} is not there: get {path.name} from {source}, place it there,"
          " and run again"
        )
      try:
        _verify(arrived, path, sha256)
        os.replace(arrived, path)
      finally:
        shutil.rmtree(path.parent / ".hub", ignore_errors=True)
      return path
  except OSError as error:
    raise errors.UsageError(
      f"{path} cannot be written ({error.strerror or error}); set"
      " JAXTRANSFER_CACHE to a directory with room"
    ) from None


def _verify(
  arrived: pathlib.Path, path: pathlib.Path, sha256: str | None
) -> pathlib.Path:
  """Checks a file's digest; a download that fails is removed."""
  digest = files.sha256_of(arrived)
  first_uses = path.parent.parent / "digests.json"
  key = f"{path.parent.name}/{path.name}"
  if sha256 is None or len(sha256) < 64:
    seen = _read_digests(first_uses)
    expected = seen.get(key, sha256 or "")
    origin = f"on first use ({first_uses})" if key in seen else "when published"
  else:
    seen = None
    expected, origin = sha256, "when published"
  if not digest.startswith(expected):
    what = "replace it"
    if arrived != path:
      arrived.unlink(missing_ok=True)
      what = "the download was removed"
    raise errors.UsageError(
      f"{path}: SHA-256 is {digest}, but it was {expected} {origin}; {what}"
    )
  if seen is not None and key not in seen:
    with files.lock(first_uses.with_suffix(".lock"), wait=True):
      files.write_json(first_uses, {**_read_digests(first_uses), key: digest})
  return path


def _read_digests(path: pathlib.Path) -> dict[str, str]:
  try:
    return dict(json.loads(path.read_text()))
  except FileNotFoundError:
    return {}
  except (ValueError, TypeError):
    raise errors.UsageError(
      f"{path}: not the JSON object of digests that was written here; repair"
      " it, or remove it to trust the files as they are now"
    ) from None


def _from_hub(
  path: pathlib.Path,
  repository: str,
  revision: str | None,
  loopback: str | None,
) -> pathlib.Path:
  try:
    return pathlib.Path(
      huggingface_hub.hf_hub_download(
        repository,
        path.name,
        revision=revision,
        local_dir=path.parent / ".hub",
        endpoint=loopback,
      )
    )
  # The hub's client raises its own, its HTTP library's and the system's
  # errors; the user's remedy is the same for all.
  except Exception as error:
    page = f"https://huggingface.co/{repository}"
    at = f" at revision {revision}" if revision else ""
    raise errors.UsageError(
      f"{path.name} of {page}{at} could not be downloaded"
      f" ({_first_line(error)}); with no network, place the file at {path}"
    ) from None


def _from_url(
  path: pathlib.Path, url: str, loopback: str | None
) -> pathlib.Path:
  """Downloads to `<file>.part`, going on from what is there."""
  part = path.with_name(f"{path.name}.part")
  try:
    _download(url, part, loopback)
  except (
    urllib.error.URLError,
    http.client.HTTPException,
    ssl.SSLError,
    TimeoutError,
    ConnectionError,
  ) as error:
    raise errors.UsageError(
      f"{url} could not be downloaded ({_first_line(error)}); run again to go"
      f" on, or with no network place the file at {path}"
    ) from None
  return part


def _download(url: str, part: pathlib.Path, loopback: str | None) -> None:
  # What the server said of the file the part belongs to: a part of one file
  # must not be completed with the rest of another.
  tag_path = part.with_name(f"{part.name}.etag")
  start = part.stat().st_size if part.exists() else 0
  tag = tag_path.read_text() if tag_path.exists() else ""
  headers = {"User-Agent": "jaxtransfer", "Accept-Encoding": "identity"}
  if start and tag:
    headers |= {"Range": f"bytes={start}-", "If-Range": tag}
  opener = urllib.request.build_opener(_OnlyHttps(loopback))
  _check_scheme(url, loopback)
  request = urllib.request.Request(url, headers=headers)
  try:
    response = opener.open(request, timeout=_TIMEOUT_SECONDS)
  except urllib.error.HTTPError as error:
    # Nothing is left to send: the part was whole, or belongs to another file.
    if error.code != 416 or "Range" not in headers:
      raise
    part.unlink()
    _download(url, part, loopback)
    return
  with response:
    if response.status == 206:
      first, total = _content_range(response)
      if first != start:
        raise http.client.HTTPException("the server sent another part")
    else:
      start = 0
      total = int(response.headers.get("Content-Length") or -1)
    # A weak tag does not promise the same bytes.
    etag = response.headers.get("ETag", "")
    tag_path.write_text("" if etag.startswith("W/") else etag)
    with (
      open(part, "ab" if start else "wb") as f,
      progress.Progress(
        part.name.removesuffix(".part"),
        "bytes",
        total if total > 0 else None,
        start,
      ) as bar,
    ):
      while chunk := response.read(_CHUNK):
        f.write(chunk)
        bar.update(len(chunk))
      f.flush()
      os.fsync(f.fileno())
  size = part.stat().st_size
  if 0 <= total != size:
    raise http.client.HTTPException(f"{size:,} of {total:,} bytes came")
  tag_path.unlink(missing_ok=True)


def _content_range(response: http.client.HTTPResponse) -> tuple[int, int]:
  """Returns (first byte, bytes in all) of `bytes 5-9/10`."""
  value = response.headers.get("Content-Range", "")
  try:
    span, total = value.removeprefix("bytes ").split("/")
    return int(span.split("-")[0]), int(total)
  except ValueError:
    raise http.client.HTTPException(
      f"an unreadable Content-Range, {value!r}"
    ) from None


def _check_scheme(url: str, loopback: str | None) -> None:
  if url.startswith("https://"):
    return
  if loopback is not None and url.startswith(f"{loopback}/"):
    if urllib.parse.urlsplit(loopback).hostname == "127.0.0.1":
      return
  raise urllib.error.URLError(f"{url} is not https")


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
  """Follows redirects, but never to a plain connection."""

  def __init__(self, loopback: str | None):
    self._loopback = loopback

  def redirect_request(
    self,
    req: urllib.request.Request,
    fp: IO[bytes],
    code: int,
    msg: str,
    headers: http.client.HTTPMessage,
    newurl: str,
  ) -> urllib.request.Request | None:
    """Checks the new address and follows it."""
    _check_scheme(newurl, self._loopback)
    return super().redirect_request(req, fp, code, msg, headers, newurl)


def _first_line(error: Exception) -> str:
  # URLError wraps the system's error in brackets; HTTPError says it itself.
  is_wrapped = type(error) is urllib.error.URLError
  text = str(error.reason if is_wrapped else error)
  return (text.splitlines() or [type(error).__name__])[0].split(". ")[0][:200]
