"""A disk that loses its power: records what a piece of code does to a directory, and gives every state that
a power cut could leave there.

Nothing is on the disk before it is synced: a file's data are those of its last fsync, or with them any part
of what was written since, or zeros; an entry of a directory is there for certain only when that directory
was synced. Of the changes to directories since then, any may have happened and any not. This is weaker than
what ext4 or f2fs promise, and what POSIX allows.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

CHANGES = ("open", "write", "fsync", "mkdir", "rmdir", "unlink", "rename", "replace", "symlink", "close")
TAILS = ("lost", "half", "zeros", "whole")  # what becomes of data that were not synced
CHANCES = 12  # random choices among the unsynced changes, in addition to the systematic ones


@dataclass(eq=False)
class Node:
    """A file (`data`), a directory or a symbolic link (`target`). `synced` are the data that are safe."""

    data: bytearray | None = None
    synced: bytes = b""
    target: str | None = None


@dataclass(frozen=True)
class Change:
    """An entry of a directory that comes (`node`) or goes (None); a rename is two at once."""

    entries: tuple[tuple[Node, str, Node | None], ...]

    def touches(self, directory: Node) -> bool:
        return any(parent is directory for parent, _, _ in self.entries)


Tree = dict[str, "bytes | str | None"]
"""By path: a file's content, a link's target, None for a directory."""


@dataclass
class Disk:
    """What is on a disk below `root`, as the kernel shows it and as the power cut would leave it."""

    root: Path
    top: Node = field(default_factory=Node)
    base: dict[Node, dict[str, Node]] = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    states: dict[str, Tree] = field(default_factory=dict)
    choices: int = 0
    _files: dict[int, Node] = field(default_factory=dict)
    _chance: random.Random = field(default_factory=lambda: random.Random(1))

    def __post_init__(self) -> None:
        self.base = {self.top: {}}
        for path in sorted(self.root.rglob("*")):
            node = Node(target=os.readlink(path)) if path.is_symlink() else Node()
            if path.is_file() and not path.is_symlink():
                node = Node(bytearray(path.read_bytes()), path.read_bytes())
            elif path.is_dir() and not path.is_symlink():
                self.base[node] = {}
            self.base[self._now(path.parent)][path.name] = node
        self.note_states()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record all operations on the directory, and all possible states after each."""
        real = {name: getattr(os, name) for name in CHANGES}
        real["fsync"] = lambda _descriptor: None  # it is the imagined disk that is synced

        def watched(name: str) -> Any:
            def call(*arguments: Any, **keywords: Any) -> Any:
                node = self._before(name, arguments, keywords)
                result = real[name](*arguments, **keywords)
                self._after(name, arguments, keywords, result, node)
                return result

            return call

        with contextlib.ExitStack() as stack:
            for name in CHANGES:
                stack.enter_context(mock.patch.object(os, name, watched(name)))
            yield

    def note_states(self) -> None:
        """Record every state that a power cut at this moment could leave."""
        for kept in self._subsets():
            entries = {parent: dict(names) for parent, names in self.base.items()}
            for change in kept:
                for parent, name, node in change.entries:
                    names = entries.setdefault(parent, {})
                    if node is None:
                        names.pop(name, None)
                    else:
                        names[name] = node
            for tail in TAILS:
                self.choices += 1
                tree: Tree = {}
                self._grow(tree, "", self.top, entries, tail)
                digest = hashlib.sha256(repr(sorted(tree.items())).encode()).hexdigest()
                self.states.setdefault(digest, tree)

    def _subsets(self) -> Iterator[list[Change]]:
        pending = self.pending
        for count in range(len(pending) + 1):
            yield pending[:count]
        for left_out in range(len(pending)):
            yield pending[:left_out] + pending[left_out + 1 :]
            yield [pending[left_out]]
        for _ in range(CHANCES if len(pending) > 2 else 0):
            yield [change for change in pending if self._chance.random() < 0.5]

    def _grow(
        self, tree: Tree, path: str, node: Node, entries: dict[Node, dict[str, Node]], tail: str
    ) -> None:
        for name, child in entries.get(node, {}).items():
            where = f"{path}/{name}"
            if child.target is not None:
                tree[where] = child.target
            elif child.data is None:
                tree[where] = None
                self._grow(tree, where, child, entries, tail)
            else:
                more = bytes(child.data[len(child.synced) :])
                tree[where] = (
                    child.synced
                    + {
                        "lost": b"",
                        "half": more[: len(more) // 2],
                        "zeros": bytes(len(more)),
                        "whole": more,
                    }[tail]
                )

    def _before(self, name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Node | None:
        """Find the node that is about to be removed from its path."""
        if name in ("unlink", "rmdir", "rename", "replace"):
            path = self._path(arguments[0], keywords.get("dir_fd"))
            return self._now(path) if self._is_here(path.parent) else None
        if name == "open":
            path = self._path(arguments[0], keywords.get("dir_fd"))
            return self._now(path) if self._is_here(path) and path.exists() else None
        return None

    def _after(
        self, name: str, arguments: tuple[Any, ...], keywords: dict[str, Any], result: Any, node: Node | None
    ) -> None:
        if name == "open":
            self._opened(self._path(arguments[0], keywords.get("dir_fd")), result, node)
        elif name == "close":
            self._files.pop(arguments[0], None)
        elif name in ("write", "fsync"):
            self._wrote(name, arguments, result)
        else:
            self._changed(name, arguments, keywords, node)

    def _opened(self, path: Path, descriptor: int, node: Node | None) -> None:
        if not self._is_here(path):
            return
        if node is None:
            node = Node(bytearray())
            self._change(f"create {path.name}", ((self._now(path.parent), path.name, node),))
        self._files[descriptor] = node

    def _wrote(self, name: str, arguments: tuple[Any, ...], written: Any) -> None:
        node = self._files.get(arguments[0])
        if node is None:
            return
        self.log.append(name)
        if name == "write":
            assert node.data is not None
            node.data += bytes(arguments[1][:written])
        elif node.data is not None:
            node.synced = bytes(node.data)
        else:
            for change in [change for change in self.pending if change.touches(node)]:
                self._settle(change)
        self.note_states()

    def _changed(
        self, name: str, arguments: tuple[Any, ...], keywords: dict[str, Any], node: Node | None
    ) -> None:
        path = self._path(arguments[0], keywords.get("dir_fd"))
        if name == "symlink":
            path, node = self._path(arguments[1], None), Node(target=os.fspath(arguments[0]))
        if not self._is_here(path.parent):
            return
        here = self._now(path.parent)
        if name == "mkdir":
            node = Node()
        if name in ("mkdir", "symlink"):
            entries: tuple[tuple[Node, str, Node | None], ...] = ((here, path.name, node),)
        elif name in ("unlink", "rmdir"):
            entries = ((here, path.name, None),)
        else:
            target = self._path(arguments[1], None)
            entries = ((here, path.name, None), (self._now(target.parent), target.name, node))
        self._change(f"{name} {path.name}", entries)

    def _change(self, said: str, entries: tuple[tuple[Node, str, Node | None], ...]) -> None:
        self.log.append(said)
        self.pending.append(Change(entries))
        self.note_states()

    def _settle(self, change: Change) -> None:
        """Let a change be on the disk. It is put after those that are there already."""
        self.pending.remove(change)
        for parent, name, node in change.entries:
            names = self.base.setdefault(parent, {})
            if node is None:
                names.pop(name, None)
            else:
                names[name] = node

    def _now(self, path: Path) -> Node:
        """Find the node of a path as the kernel shows it."""
        entries = {parent: dict(names) for parent, names in self.base.items()}
        for change in self.pending:
            for parent, name, node in change.entries:
                if node is None:
                    entries.setdefault(parent, {}).pop(name, None)
                else:
                    entries.setdefault(parent, {})[name] = node
        found = self.top
        for part in path.relative_to(self.root).parts:
            found = entries[found][part]
        return found

    def _path(self, name: Any, dir_fd: int | None) -> Path:
        path = Path(os.fsdecode(name))
        if dir_fd is not None:
            path = Path(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
        return Path(os.path.abspath(path))

    def _is_here(self, path: Path) -> bool:
        return path == self.root or self.root in path.parents


def write_tree(tree: Tree, target: Path) -> None:
    """Write a state to a real directory."""
    target.mkdir(parents=True)
    for path, content in sorted(tree.items()):
        place = target / path.lstrip("/")
        if content is None:
            place.mkdir()
        elif isinstance(content, str):
            place.symlink_to(content)
        else:
            place.write_bytes(content)
