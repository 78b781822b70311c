"""Any folder of class folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ackd_lightning.data.custom import CustomImagesDataModule, say_test_is_validation, split_test
from ackd_lightning.data.folders import (
    ClassOrder,
    class_folders,
    class_names_of,
    part_of,
    refuse_other_classes,
    require_classes,
    say_order,
    scan_class_folders,
)
from ackd_lightning.data.messages import say
from ackd_lightning.data.path_table import PathTable
from ackd_lightning.data.sampling import Part
from ackd_lightning.data.sources import NO_LABEL, Files, Source, name_keys
from ackd_lightning.data.walk import Walk
from ackd_lightning.errors import ACKDError
from ackd_lightning.validation import checked


class ImageFolderDataModule(CustomImagesDataModule):
    """Any folder of class folders: ``root/train/<class>/*`` and ``root/test/<class>/*``.

    Parts may have other usual names, such as ``Training``, ``val`` or ``testset``. Where there are folders for
    validation and for test, validation reads its own; where there is one of them, it is the test set. A folder that
    holds the class folders themselves is split: a stratified fifth of it, always the same, is the test set. What is
    passed over (hidden and system folders, files that are not images) is said in one line.

    Args:
        root: Folder of the data.
        train_dir: Folder in ``root`` with the training images; None for the one that is named so, or ``root`` itself.
        val_dir: Folder in ``root`` with the validation images; None for the one that is named so, if there is a test
            folder too.
        test_dir: Folder in ``root`` with the test images; None for the one that is named so, else the validation
            folder.
        unlabelled: Folder, absolute or in ``root``, of further training images without labels, for methods whose
            labels are read by the cross-entropy alone; None for none.
        class_order: Order of the class folders: ``text``, or ``natural`` with numbers sorted by value (1, 2, 10).
        options: Arguments of `CustomImagesDataModule`, and those of
            [`ImageDataModule`][ackd_lightning.data.ImageDataModule].

    Raises:
        ACKDError: If ``root`` holds no such folders.
    """

    @checked
    def __init__(
        self,
        root: str | Path,
        *,
        train_dir: str | None = None,
        val_dir: str | None = None,
        test_dir: str | None = None,
        unlabelled: str | None = None,
        class_order: ClassOrder = "text",
        **options: Any,
    ) -> None:
        super().__init__(root, **options)
        self.class_order: ClassOrder = class_order
        self._unlabelled = None if unlabelled is None else self.root / unlabelled
        if self.root.is_dir() and self._unlabelled is not None and not self._unlabelled.is_dir():
            raise ACKDError(f"there is no folder {self._unlabelled}: set unlabelled to a folder of images")
        self._folders = self._layout({"train": train_dir, "val": val_dir, "test": test_dir})
        self._has_validation = "val" in self._folders
        self._whole: Files | None = None
        train = self._folders["train"]
        self._apart = self._no_classes(train)
        self._names = class_names_of(train, class_order, self._apart)
        self._flat = not self._names and "test" in self._folders and bool(Walk(self._apart).images(train))
        if self._flat:
            self._names = class_names_of(self._folders["test"], class_order)
        if not self._names:
            scan_class_folders(train, apart=self._apart)  # its error says what is there instead
        require_classes(self._folders["test" if self._flat else "train"], self._names)
        say_order(self._names, class_order)
        for part in set(self._folders) - {"train"}:
            refuse_other_classes(self._folders[part], self._names)
        self.class_names = self._names
        self.num_classes = len(self._names)

    def _layout(self, given: dict[Part, str | None]) -> dict[Part, Path]:
        """Return the folder of each part; without a test folder the training folder is split."""
        if not self.root.is_dir():
            raise ACKDError(f"there is no folder {self.root}: set root to a folder of class folders")
        more = () if self._unlabelled is None else (self._unlabelled,)
        there = [folder.name for folder in class_folders(self.root, apart=more)]
        found: dict[Part, Path] = {}
        classes = self._named_like_parts(there)
        for part, name in given.items():
            if name is not None and not (self.root / name).is_dir():
                holds = ", ".join(there[:5]) or "no folders"
                raise ACKDError(f"there is no folder {self.root / name}: {self.root} holds {holds}")
            if name is None:
                taken = () if part == "train" else given.values()
                free = [each for each in there if each not in classes and each not in taken]
                named = [each for each in free if part_of(each) == part]
                exact = [each for each in named if each == part]
                if len(named) > 1 and not exact:
                    raise ACKDError(f"{self.root} holds {' and '.join(named[:3])}: choose one with {part}_dir")
                name = next(iter(exact or named), None)
            if name is not None:
                found[part] = self.root / name
        if "test" not in found and given["val"] is None and "val" in found:
            found["test"] = found.pop("val")
            say_test_is_validation(self.root, holds_out=not self.val_is_test)
        if "train" not in found and found:
            name = next(iter(found.values())).name
            raise ACKDError(
                f"{self.root} holds the folder {name} but no folder train: name it with train_dir, or set train_dir to "
                ". where the class folders are beside it"
            )
        places = [place for place in (*found.values(), *more) if place.is_relative_to(self.root)]
        inside = [place.relative_to(self.root).parts for place in places]
        used = set(there) if () in inside else {parts[0] for parts in inside}  # train_dir: .
        if found and (others := [each for each in there if each not in used]):
            say(f"folders of {self.root} that are not read: {', '.join(others[:5])}{', …' if len(others) > 5 else ''}")
        for part in ("val", "test"):
            if part in found and found[part].resolve() == found.get("train", self.root).resolve():
                say(f"the {part} part is the training part: both are {found[part]}")
        return {"train": self.root, **found}

    def _named_like_parts(self, there: Sequence[str]) -> list[str]:
        """Folders that are classes although they are named like parts of the data: all folders hold images alone."""
        named = [each for each in there if part_of(each)]
        if not named or len(named) == len(there):
            return []
        folders = [self.root / each for each in there]
        if any(class_folders(each) for each in folders) or not all(Walk().images(each) for each in folders):
            return []
        say(f"classes of {self.root} that are named like parts of the data: {', '.join(named)}")
        return named

    def _no_classes(self, train: Path) -> list[Path]:
        """Folders in the training folder that are read as something else, or are named and arranged as another part."""
        read = [place for part, place in self._folders.items() if part != "train"]
        if self._unlabelled is not None:
            self._refuse_tested(self._unlabelled)
            read.append(self._unlabelled)
            if train.resolve().is_relative_to(self._unlabelled.resolve()):
                raise ACKDError(
                    f"unlabelled is {self._unlabelled}, which holds the training part {train}: set it to a folder of "
                    "further images"
                )
        above = {place: {*place.parents, *place.resolve().parents} for place in read}
        read = [place for place in read if above[place] & {train, train.resolve()}]
        higher = {each for place in read for each in above[place]}
        folders = class_folders(train, apart=read)
        names = {folder.name for folder in folders}

        def is_class(folder: Path) -> bool:
            if higher and higher & {folder, folder.resolve()}:
                return bool(Walk(read).images(folder))
            named = part_of(folder.name) in ("val", "test")
            return not named or names.isdisjoint(each.name for each in class_folders(folder))

        others = [folder for folder in folders if not is_class(folder)]
        if read or others:
            listed = ", ".join(each.name for each in read + others)
            say(f"folders in {train} that are no classes of the training part: {listed}")
        return read + others

    def _refuse_tested(self, unlabelled: Path) -> None:
        """Refuse to train without labels on a part that measures accuracy, and say which one is left out there."""
        for part, place in self._folders.items():
            if part == "train":
                continue
            if unlabelled.resolve().is_relative_to(place.resolve()):
                raise ACKDError(
                    f"unlabelled is {unlabelled}, which belongs to the {part} part {place}: set it to a folder of "
                    "further images"
                )
            if place.resolve().is_relative_to(unlabelled.resolve()):
                say(f"the {part} part {place} is left out of the unlabelled images in {unlabelled}")

    def listed(self) -> dict[Part, Files]:
        """Return the image files of each part as they lie in the folders, before any of them is opened."""
        parts: tuple[Part, ...] = ("train", "val", "test") if self._has_validation else ("train", "test")
        return {part: self._files(part) for part in parts}

    def _load(self, part: Part) -> Source:
        return self._read(self._files(part), self.root, part)

    def _files(self, part: Part) -> Files:
        if part == "train" and self._flat:
            files = self._without_labels(self._folders["train"])
        elif part == "train" or part not in self._folders:
            kept = None if part == "train" else self._whole  # files may have changed since an earlier setup
            train = self._folders["train"]
            files = kept or scan_class_folders(train, order=self.class_order, apart=self._apart)
            if "test" not in self._folders:
                self._whole = files if part == "train" else None  # the test part is read next
                keys = name_keys(files)
                files = files.select(split_test(files.targets, part, self.root, names=self._names, keys=keys))
        else:
            files = scan_class_folders(self._folders[part], classes=self._names, order=self.class_order)
        if part != "train" or self._unlabelled is None:
            return files
        more = self._without_labels(self._unlabelled)
        paths = PathTable.joined([files.paths.below(self.root), more.paths.below(self.root)])
        return replace(files, paths=paths, targets=torch.cat([files.targets, more.targets]))

    def _without_labels(self, folder: Path) -> Files:
        walk = Walk([*self._apart, *(place for part, place in self._folders.items() if part != "train")])
        paths = PathTable.of(folder, walk.listed(folder))
        walk.report(folder)
        if not len(paths):
            raise ACKDError(f"{folder} holds no images: set unlabelled to a folder of images")
        return Files(folder, self._names, paths, torch.full((len(paths),), NO_LABEL))
