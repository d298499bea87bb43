"""The run directory: everything a run leaves behind, written so that a kill loses nothing.

    config.json       the run's config
    members.json      what makes each member differ
    provenance.json   git revision, package versions, hardware, commands
    metrics.jsonl     one row a figure (`ROW_FIELDS`)
    training.jsonl    one line an epoch and member: loss, seconds, images per second
    checkpoints/STEP  orbax: `state`, `attack` (poison masks, triggers), `meta`
    manifest.json     SHA-256 of every file of a whole checkpoint, of config and members, and of
                      the figures up to the newest checkpoint

A checkpoint counts only once the manifest lists it; the manifest is replaced in one move after the
checkpoint is complete. Figures of an epoch are written before its checkpoint, so that resuming from
a checkpoint finds all earlier figures, and drops those of work that is about to be repeated.
`provenance.json`, which every session adds to, and the manifest carry sums of their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import ml_collections
import psutil

from pmoe_jax import config as config_lib
from pmoe_jax import processes, provenance
from pmoe_jax.errors import PmoeError
from pmoe_jax.files import (
    LINES_LIMIT,
    DiskError,
    LockedFolder,
    damage_of,
    oversized,
    remove_leftovers,
    sha256,
    sum_of_object,
    write_atomically,
)
from pmoe_jax.members import Member
from pmoe_jax.rows import Row, read_lines

_BEFORE_TRAINING = (
    ".lock", "config.json", "members.json", "provenance.json", "manifest.json", "checkpoints",
)  # fmt: skip
_DESCRIPTION = ("config.json", "members.json")
_OTHERS = ("provenance.json", "manifest.json")
_FIGURES = ("metrics.jsonl", "training.jsonl")
#: What a manifest may list.
_LISTED = re.compile(
    r"config\.json|members\.json|metrics\.jsonl|training\.jsonl|checkpoints/[0-9]{1,15}/.+"
)
#: The sum of a file that grows: of how many bytes at its beginning.
_SUM_OF_BEGINNING = re.compile(r"([0-9a-f]{64}) of the first ([0-9]{1,15}) bytes")


class RunDirectory(LockedFolder):
    """A run directory on disk. Use as a context manager where it is written to: it is locked."""

    @property
    def name(self) -> str:
        """The directory's own name, which rows carry; also where the path is "."."""
        return self.path.resolve().name

    # --- creating --------------------------------------------------------------------------------

    @processes.by_first
    def start(self, config: ml_collections.ConfigDict, members: Sequence[Member]) -> None:
        """Writes config and members, or checks that a run found here is the same.

        Raises:
          PmoeError: the directory holds a different run (the difference is named), or other files.
        """
        described = [member.to_json() for member in members]
        remove_leftovers(self.path, ("config.json", "members.json", *_OTHERS))
        for name in _DESCRIPTION:
            self._check(name)  # Also one that is missing, though it is listed.
        begun = self._has("config.json") and self._has("members.json")
        if begun:
            changed = config_lib.differences(
                self.config().to_dict(), config.to_dict(), ignore=config_lib.HOW
            )
            if not changed and [member.to_json() for member in self.members()] != described:
                changed = ["the members differ"]
            if changed and not self.whole_steps() and not self._has("metrics.jsonl"):
                # Nothing came of it (it did not fit into memory, say): the directory is taken over.
                self._check_strange((*_BEFORE_TRAINING, "training.jsonl", "profile"))
                self._remove_what_nothing_came_of()
                begun = False
            elif changed:
                raise PmoeError(
                    f"{self.path} holds a run with another config ({'; '.join(changed)}); "
                    "resume it with its own config or choose another workdir"
                )
        else:
            # Our lock is older than anything else of ours; without it, config.json is another's.
            self._check_strange(_BEFORE_TRAINING if self._found is None else (".lock",))
            self.whole_steps()
        if not begun:
            write_atomically(self.path / "config.json", config_lib.to_json(config))
            write_atomically(self.path / "members.json", json.dumps(described, indent=2) + "\n")
        remove_leftovers(self.path)
        if not self.whole_steps():
            self.seal([])
        self.begin_session()

    def _check_strange(self, known: Collection[str]) -> None:
        """Raises PmoeError if the directory holds anything but these files and folders."""
        strange = sorted({entry.name for entry in self.path.iterdir()}.difference(known))
        if strange:
            raise PmoeError(
                f"{self.path} is not empty and holds no run ({strange[0]}); "
                "choose a new or empty workdir"
            )

    def _remove_what_nothing_came_of(self) -> None:
        """Removes a run without checkpoints and figures, in an order that a kill can break off."""
        # Checkpoints without a manifest, and listed files that are missing, would be refused.
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)
        for name in ("training.jsonl", "manifest.json", "provenance.json", "config.json"):
            (self.path / name).unlink(missing_ok=True)

    @processes.by_first
    def begin_session(self) -> None:
        """Adds this session (command, revision, packages, hardware) to `provenance.json`.

        Raises:
          PmoeError: what stands there is damaged.
        """
        previous = provenance.read(self.path / "provenance.json")
        sessions = [*previous.get("sessions", []), provenance.session()]
        self._write_provenance({**previous, **provenance.facts(), "sessions": sessions})

    @processes.by_first
    def note(self, **facts: Any) -> None:
        """Adds facts (such as the data set's fingerprint) to `provenance.json`.

        Raises:
          PmoeError: a fact was noted otherwise before.
        """
        known = provenance.read(self.path / "provenance.json")
        for name, fact in facts.items():
            if known.get(name, fact) != fact:
                raise PmoeError(
                    f"{self.path} was begun with another {name} ({known[name]}, now {fact}); "
                    "resume it with the same one or choose another workdir"
                )
        self._write_provenance({**known, **facts})

    def _write_provenance(self, facts: dict[str, Any]) -> None:
        facts["sha256"] = sum_of_object(facts)
        write_atomically(self.path / "provenance.json", json.dumps(facts, indent=2) + "\n")

    # --- reading --------------------------------------------------------------------------------

    def config(self) -> ml_collections.ConfigDict:
        """The run's config, validated.

        Raises:
          PmoeError: missing or damaged.
        """
        self._check("config.json")
        return config_lib.from_json(self.path / "config.json")

    def members(self) -> list[Member]:
        """The run's members.

        Raises:
          PmoeError: missing or damaged.
        """
        self._check("members.json")
        stored = self._read_json("members.json")
        if not isinstance(stored, list) or not stored:
            raise PmoeError(f"{self.path / 'members.json'} holds no members; restore the file")
        try:
            return [Member.from_json(entry) for entry in stored]
        except PmoeError as error:
            raise PmoeError(f"{self.path / 'members.json'} is damaged: {error}") from None

    def noted(self, fact: str) -> dict[str, Any]:
        """A fact of `provenance.json` (see `note`); empty where it is not known."""
        try:
            known = provenance.read(self.path / "provenance.json")
        except PmoeError:  # Figures do not depend on it.
            return {}
        noted = known.get(fact)
        return noted if isinstance(noted, dict) else {}

    def rows(self) -> list[Row]:
        """All rows of `metrics.jsonl`; a last line torn by a kill is left out.

        Raises:
          PmoeError: another line is damaged, or the file is not what it was at the newest
            checkpoint.
        """
        return self.lines("metrics.jsonl")

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The lines of a file of figures; raises as `rows`."""
        listed = self._manifest().get(name) if self._has("manifest.json") else None
        problem = _damage_of_beginning(self.path / name, listed) if listed else None
        if problem:
            raise PmoeError(f"{problem}; restore the file")
        return read_lines(self.path / name)

    def _has(self, name: str) -> bool:
        return (self.path / name).exists()

    def _read_json(self, name: str) -> Any:
        path = self.path / name
        try:
            return json.loads(config_lib.read_text(path))
        except (FileNotFoundError, NotADirectoryError):
            raise PmoeError(f"{path} does not exist; give the directory of a run") from None
        except (OSError, ValueError, RecursionError) as error:
            raise PmoeError(f"{path} cannot be read ({error}); restore the file") from None

    # --- figures --------------------------------------------------------------------------------

    @processes.by_first
    def append(self, name: str, lines: Iterable[dict[str, Any]]) -> None:
        """Appends JSON lines to a file and forces them to disk: all of them or none.

        Raises:
          DiskError: the disk refuses.
          PmoeError: the directory is gone.
        """
        self.check_still_there()
        path, text = self.path / name, "".join(json.dumps(line) + "\n" for line in lines)
        before = path.stat().st_size if path.exists() else 0
        try:
            # Not through a link, which might lead out of the directory.
            way = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
            with open(os.open(path, way, 0o666), "a") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # No torn line for a later append to go on from.
                os.truncate(path, before)
            raise DiskError(
                f"{path} cannot be written ({error.strerror}); the last whole "
                "checkpoint is kept: make room and run the same command again"
            ) from None

    @processes.by_first
    def drop_after(self, epoch: int) -> None:
        """Removes figures of epochs after `epoch`, which are about to be computed again.

        Raises:
          PmoeError: what should stay is damaged.
        """
        kept = {}
        for name in _FIGURES:
            lines = [line for line in self.lines(name) if line["epoch"] <= epoch]
            if (self.path / name).exists():
                kept[name] = "".join(json.dumps(line) + "\n" for line in lines)
        if self._has("manifest.json"):
            # First: a longer file than is listed is whole, a shorter one is not.
            manifest = self._manifest()
            listed = {name: _sum_of_beginning(text.encode()) for name, text in kept.items()}
            if any(name in manifest and manifest[name] != new for name, new in listed.items()):
                self._write_manifest({**manifest, **listed})
        for name, text in kept.items():
            if (self.path / name).read_bytes() != text.encode():
                write_atomically(self.path / name, text)

    # --- manifest -------------------------------------------------------------------------------

    @processes.by_first
    def seal(self, steps: Iterable[int]) -> None:
        """Rewrites the manifest: it lists exactly these checkpoints, the run's description, and the
        figures so far.

        Raises:
          DiskError: the disk refuses.
        """
        # Known sums of what never changes are kept, not made anew, so that damage which happened
        # meanwhile is still found.
        old = self._manifest() if self._has("manifest.json") else {}
        try:
            manifest = {name: old.get(name) or self._sum(name) for name in _DESCRIPTION}
            for name in _FIGURES:
                path, known = self.path / name, old.get(name)
                if known and _damage_of_beginning(path, known):
                    manifest[name] = known
                elif path.exists():
                    manifest[name] = _sum_of_beginning(path.read_bytes())
            for step in steps:
                prefix = f"checkpoints/{step}/"
                listed = {name: digest for name, digest in old.items() if name.startswith(prefix)}
                manifest |= listed or {name: self._sum(name) for name in self._files_below(prefix)}
        except OSError as error:
            raise DiskError(
                f"{error.filename or self.path} cannot be read ({error.strerror}); the checkpoint "
                "does not count: run the same command again"
            ) from None
        self._write_manifest(manifest)

    def _write_manifest(self, manifest: dict[str, str]) -> None:
        sealed = {**manifest, "sha256": sum_of_object(manifest)}
        write_atomically(self.path / "manifest.json", json.dumps(sealed, indent=1) + "\n")

    def is_sealed(self, name: str) -> bool:
        """Whether the manifest covers all of a file of figures."""
        listed = _SUM_OF_BEGINNING.fullmatch(self._manifest().get(name, ""))
        path = self.path / name
        return listed is not None and path.is_file() and path.stat().st_size == int(listed[2])

    def whole_steps(self) -> list[int]:
        """Steps of the checkpoints that the manifest lists, oldest first.

        Raises:
          PmoeError: the manifest is damaged, or missing although there are checkpoints.
        """
        if not self._has("manifest.json"):
            if any(self.path.glob("checkpoints/*")):
                # A run has its manifest before its first checkpoint.
                raise PmoeError(
                    f"{self.path / 'manifest.json'} is missing, so that no checkpoint can be "
                    "trusted; restore the file, or remove the checkpoints to start over"
                )
            return []
        parts = [name.split("/") for name in self._manifest()]
        return sorted({int(p[1]) for p in parts if p[0] == "checkpoints"})

    def sum_of_checkpoint(self, step: int) -> str:
        """SHA-256 over the listed sums of a checkpoint's files, which say when it was saved: of a
        copy it is the same, of the same run trained anew another."""
        prefix = f"checkpoints/{step}/"
        listed = [item for item in sorted(self._manifest().items()) if item[0].startswith(prefix)]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def damage(self, step: int, most: int | None = None) -> str | None:
        """The first file of a checkpoint that is missing, altered or foreign, and what is wrong.

        `most` is what its files may have together, by default the free memory: a file with a hole
        of a terabyte would be summed for an hour.
        """
        prefix, manifest = f"checkpoints/{step}/", self._manifest()
        most = psutil.virtual_memory().available if most is None else most
        total = 0
        for name, digest in manifest.items():
            if not name.startswith(prefix):
                continue
            path = self.path / name
            total += path.stat().st_size if path.is_file() else 0
            if total > most:
                return f"{path} is too large: checkpoint {step} can have {most} bytes in all"
            # Arrays are read by the shapes that were asked for, all else as a whole.
            arrays = re.search(r"/(d|ocdbt\.process_[0-9]+)/", name)
            large = None if arrays else oversized(path, config_lib.JSON_LIMIT)
            problem = large or damage_of(path, digest)
            if problem:
                return problem
        # The reader of a checkpoint looks for files of certain names: none may have been added.
        for name in self._files_below(prefix):
            if name not in manifest and not name.rpartition("/")[2].startswith("."):
                return f"{self.path / name} is not part of the checkpoint"
        return None

    def _check(self, name: str) -> None:
        """Raises if a described file differs from what was sealed with the last checkpoint."""
        digest = self._manifest().get(name) if self._has("manifest.json") else None
        path, limit = self.path / name, config_lib.JSON_LIMIT
        problem = (oversized(path, limit) or damage_of(path, digest)) if digest else None
        if problem:
            raise PmoeError(f"{problem}; restore the file")

    def _files_below(self, folder: str) -> list[str]:
        # Whatever is no folder: a pipe, too, would be opened by the reader of a checkpoint.
        found = sorted(path for path in (self.path / folder).rglob("*") if not path.is_dir())
        return [path.relative_to(self.path).as_posix() for path in found]

    def _sum(self, name: str) -> str:
        return sha256(self.path / name)

    def _manifest(self) -> dict[str, str]:
        manifest = self._read_json("manifest.json")
        fine = isinstance(manifest, dict)
        if fine and "sha256" in manifest:  # Manifests of older versions have no sum of their own.
            fine = manifest.pop("sha256") == sum_of_object(manifest)
        fine = fine and all(
            isinstance(digest, str)
            and _LISTED.fullmatch(name)
            and ".." not in name.split("/")
            and (name not in _FIGURES or _SUM_OF_BEGINNING.fullmatch(digest))
            for name, digest in manifest.items()
        )
        if not fine:
            raise PmoeError(f"{self.path / 'manifest.json'} is damaged; restore the file")
        return manifest


def _sum_of_beginning(content: bytes) -> str:
    """What the manifest says of a file of figures: the sum of its whole lines."""
    whole = content[: content.rfind(b"\n") + 1]
    return f"{hashlib.sha256(whole).hexdigest()} of the first {len(whole)} bytes"


def _damage_of_beginning(path: pathlib.Path, listed: str) -> str | None:
    """What is wrong with a file of figures, which may have grown since it was listed."""
    digest, size = _SUM_OF_BEGINNING.fullmatch(listed).groups()  # type: ignore[union-attr]
    if not path.is_file():
        return f"{path} is missing" if int(size) else None
    if problem := oversized(path, LINES_LIMIT):
        return problem
    same = sha256(path, int(size)) == digest
    return None if same else f"{path} does not match its SHA-256 sum"
