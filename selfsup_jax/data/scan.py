"""Finds the image files of a folder: each once, whatever links lead to it."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Mapping

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_LONGEST = max(map(len, ENDINGS))

_Id = tuple[int, int]  # device and inode: the same for all names of a file or folder


def images(roots: Mapping[str, str]) -> dict[str, tuple[list[str], Counter[str]]]:
    """The image files below the folder of each split, and what is left out there.

    Links are followed. A folder or file that several names or links lead to is taken once, under
    its own name rather than a link's. What the first split (`train`) has is in no other one.

    Returns:
        Split -> (paths relative to its folder, kind of what is left out -> how many). Hidden files
        are ignored.
    """
    folders = {_id(os.stat(root)) for root in roots.values()}  # a link in one leads to no other
    first: _Split | None = None
    files = {}
    for name, root in roots.items():
        split = _Split(root, folders, first)
        first = first or split
        files[name] = (split.files, split.left_out)
    return files


def listed(left_out: Mapping[str, int]) -> str:
    """`{".heic": 12, ".txt": 1}` -> `12 .heic, 1 .txt`; the most frequent first."""
    kinds = sorted(left_out.items(), key=lambda kind: (-kind[1], kind[0]))
    shown = [f"{count:,} {kind}" for kind, count in kinds[:8]]
    if len(kinds) > 8:
        shown.append(f"{sum(count for _, count in kinds[8:]):,} others")
    return ", ".join(shown)


class _Split:
    """The files of one split; `first` is the split whose files are not taken again.

    Only links, folders, and names with the same inode are looked up by `stat`: for a large folder
    on a file server, one call per file would take minutes. Paths are put together as texts, which
    takes a third of `os.path.join`'s time.
    """

    def __init__(self, root: str, folders: set[_Id], first: _Split | None):
        self.files: list[str] = []
        self.left_out: Counter[str] = Counter()
        self._root = os.path.join(root, "")  # with a separator
        self._folders: set[_Id] = folders | (first._folders if first else set())
        # Inode -> the only path with it, or, once there are several, what `stat` says of them.
        self._by_inode: dict[int, str | set[_Id]] = {}
        if first:
            for inode, known in first._by_inode.items():
                self._by_inode[inode] = known if isinstance(known, str) else set(known)
        links = self._take_folder("")
        while links:  # in an order that does not depend on the file system
            links.sort()
            links += self._take_link(links.pop(0))

    def _take_folder(self, top: str) -> list[str]:
        """Takes what lies in a folder and below; returns the links there, which it leaves."""
        links: list[str] = []
        inodes: dict[str, int] = {}  # a million pairs would keep the garbage collector busy
        pending = [top]
        while pending:
            folder = pending.pop()
            before = folder and folder + os.sep
            try:
                with os.scandir(self._root + folder) as entries:
                    for entry in entries:
                        path = before + entry.name
                        if entry.is_symlink():
                            links.append(path)
                        elif entry.is_dir():
                            if self._is_new(entry.stat()):
                                pending.append(path)
                        elif entry.name.startswith("."):
                            continue
                        elif not entry.is_file():
                            self.left_out["pipes, sockets or devices"] += 1
                        elif self._is_image(path):
                            inodes[path] = entry.inode()
            except OSError as e:
                self.left_out[f"folders that cannot be read ({folder or '.'}: {e.strerror})"] += 1
        for path in sorted(inodes):
            self._take_file(path, inodes[path])
        return links

    def _take_link(self, path: str) -> list[str]:
        hidden = os.path.basename(path).startswith(".")
        try:
            target = os.stat(os.path.join(self._root, path))
        except OSError:  # to nothing, or to itself
            if not hidden:
                self.left_out["broken links"] += 1
            return []
        if stat.S_ISDIR(target.st_mode):
            if self._is_new(target):
                return self._take_folder(path)
            self.left_out["links to folders that are taken already"] += 1
        elif hidden:
            return []
        elif not stat.S_ISREG(target.st_mode):
            self.left_out["pipes, sockets or devices"] += 1
        elif self._is_image(path):
            self._take_file(path, target.st_ino)
        return []

    def _take_file(self, path: str, inode: int) -> None:
        whole = self._root + path
        same_inode = self._by_inode.setdefault(inode, whole)
        if same_inode != whole:
            # Inodes are counted per device, and some file systems list the same one for all files.
            if isinstance(same_inode, str):
                same_inode = self._by_inode[inode] = {_id(os.stat(same_inode))}
            now = _id(os.stat(whole))
            if now in same_inode:
                self.left_out["links to images that are taken already"] += 1
                return
            same_inode.add(now)
        self.files.append(path)

    def _is_new(self, folder: os.stat_result) -> bool:
        before = len(self._folders)
        self._folders.add(_id(folder))
        return len(self._folders) > before

    def _is_image(self, path: str) -> bool:
        if path[-_LONGEST:].lower().endswith(ENDINGS):  # hidden files do not come here
            return True
        ending = os.path.splitext(path)[1].lower()
        self.left_out[ending or "files without an ending"] += 1
        return False


def _id(status: os.stat_result) -> _Id:
    return status.st_dev, status.st_ino
