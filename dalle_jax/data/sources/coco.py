"""MS-COCO captions: the official JSON and a folder of images; one record per image with all its captions.

An image without captions, a caption without an image, a blank caption and a repeated image id have slots of their own,
so that a report counts them.
"""

import collections
import json
import os

from dalle_jax.data.record import BadRecord, Dropped, Record
from dalle_jax.data.sources import captions, folder
from dalle_jax.errors import UserError

OFFICIAL_SPLIT = "val2014"


def official_layout(folder: str, split: str) -> tuple[str, str]:
    """The captions file and the folder of images of the official download, unpacked in a folder.

        FOLDER/annotations/captions_val2014.json    of annotations_trainval2014.zip
        FOLDER/val2014/COCO_val2014_*.jpg           of val2014.zip

    Raises:
      UserError: a part is missing; the message names it.
    """
    captions_file = os.path.join("annotations", f"captions_{split}.json")
    paths = [os.path.join(folder, part) for part in (captions_file, split)]
    found = os.path.isfile(paths[0]), os.path.isdir(paths[1])
    year = split[-4:]
    archives = (captions_file, f"annotations_trainval{year}.zip"), (f"{split}{os.sep}", f"{split}.zip")
    missing = [
        f"{part} ({archive} holds it)" for (part, archive), there in zip(archives, found, strict=True) if not there
    ]
    if missing:
        raise UserError(
            f"expected the official download of MS-COCO unpacked in {folder}, got it without {' and '.join(missing)}: "
            "unpack the rest there, or name both parts as coco:JSON,DIR"
        )
    return paths[0], paths[1]


def open_coco(name: str, place: str, *, captions_required: bool = True) -> "CocoSource":
    """The source of 'JSON,DIR', or of 'DIR[@SPLIT]', a folder with the official download.

    Raises:
      UserError: a part is not there or not readable.
    """
    commas = [at for at, letter in enumerate(place) if letter == ","]
    pairs = [tuple(os.path.expanduser(part) for part in (place[:at], place[at + 1 :])) for at in commas]
    if not pairs:
        folder, _, split = place.partition("@")
        pairs = [official_layout(os.path.expanduser(folder), split or OFFICIAL_SPLIT)]
    # A path may have commas too.
    path, images = next((pair for pair in pairs if os.path.isfile(pair[0]) and os.path.isdir(pair[1])), pairs[-1])
    return CocoSource(name, path, images, captions_required=captions_required)


class CocoSource:
    """Records in the order of the JSON's images. See `record.Source`; opened by `open_source('coco:JSON,DIR')`.

    Raises:
      UserError: no such JSON or folder, a JSON that does not parse or has another form, no images that have a file, or
        captions of other images only.
    """

    def __init__(self, name: str, path: str, images: str, *, captions_required: bool = True):
        self.name, self._folder, self._captions_required = name, images, captions_required
        if not os.path.isdir(images):
            raise UserError(f"expected a folder of images, got {images}, which is no folder: check the path")
        listed, annotations = _load(path)
        self._faults: list[Dropped] = []
        self._files = self._take_images(listed)
        self._captions = self._take_captions(annotations)
        self._ids = list(self._files)
        if not self._ids:
            first = f", the first of them {listed[0]!r:.200}" if listed else ""
            raise UserError(
                f"expected images with an id and a file_name in {path}, got none among {len(listed)}{first}: check the "
                "file"
            )
        ids = {_id(annotation.get("image_id")) for annotation in annotations if isinstance(annotation, dict)}
        if captions_required and ids and not ids & self._files.keys():
            raise UserError(
                f"expected captions of the images in {path}, got none whose image_id is the id of an image, such as "
                f"{self._ids[0]!r}; the first annotation is {annotations[0]!r:.200}: check the file"
            )

    def __len__(self) -> int:
        return len(self._ids) + len(self._faults)

    def __getitem__(self, index: int) -> Record | Dropped:
        index = range(len(self))[index]
        if index >= len(self._ids):
            return self._faults[index - len(self._ids)]
        file_name = self._files[self._ids[index]]
        texts = self._captions.get(self._ids[index], ())
        try:
            image = folder.read_image(self._folder, file_name)
            if not texts and self._captions_required:
                raise BadRecord("no caption", f"no annotation of image {self._ids[index]} has a caption")
            return Record(file_name, image, texts)
        except BadRecord as bad:
            return Dropped(file_name, bad.reason, bad.detail)

    def captions_of(self, index: int) -> tuple[str, ...]:
        index = range(len(self))[index]
        return self._captions.get(self._ids[index], ()) if index < len(self._ids) else ()

    def _take_images(self, listed: list) -> dict[str, str]:
        """Image id -> file name."""
        files: dict[str, str] = {}
        for number, image in enumerate(listed):
            fields = image if isinstance(image, dict) else {}
            image_id, file_name = _id(fields.get("id")), fields.get("file_name")
            if "id" not in fields or not isinstance(file_name, str) or not file_name:
                self._faults.append(Dropped(f"images[{number}]", "no image", "no id or no file_name"))
            elif image_id in files:
                self._faults.append(Dropped(file_name, "duplicate key", f"image id {image_id} comes twice"))
            else:
                files[image_id] = file_name
        return files

    def _take_captions(self, annotations: list) -> dict[str, tuple[str, ...]]:
        texts = collections.defaultdict(tuple)
        for number, annotation in enumerate(annotations):
            key, fields = f"annotations[{number}]", annotation if isinstance(annotation, dict) else {}
            image_id = _id(fields.get("image_id"))
            try:
                caption = captions.from_fields(fields, names=("caption",))
                if image_id not in self._files:
                    raise BadRecord("no image", f"no image has id {image_id}")
                texts[image_id] += caption
            except BadRecord as bad:
                self._faults.append(Dropped(key, bad.reason, bad.detail or f"of image {image_id}"))
        return dict(texts)


def _id(value: object) -> str:
    """An id as text, since some tools write 33, some "33" and some 33.0."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _load(path: str) -> tuple[list, list]:
    try:
        with open(path, "rb") as file:
            content = json.load(file)
    except OSError as error:
        raise UserError(f"expected a COCO captions JSON, got {path} ({error.strerror}): check the path") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"expected a complete COCO captions JSON, but {path} does not parse ({error}): fetch it again"
        ) from error
    content = content if isinstance(content, dict) else {}
    images, annotations = content.get("images"), content.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise UserError(
            f"expected lists 'images' and 'annotations' in {path}, got another kind of JSON: check the file"
        )
    return images, annotations
