"""TensorFlow Datasets through the data sources of tfds: random access without TensorFlow.

The dataset must be prepared in the array_record format; nothing is downloaded here, as it can be hundreds of gigabytes.
It is opened from its files alone, because the code that prepares a dataset often imports TensorFlow. Records are read
raw and parsed by tfds, so that images reach our decoder as encoded files. Captions come from text features, or from
the names of class labels. `tfds:image_folder/SPLIT@DIR` reads the layout of tfds' ImageFolder, DIR/SPLIT/LABEL/*.jpg,
for which tfds itself would need TensorFlow.
"""

import functools
import os
import re
import threading

import numpy as np

from dalle_jax.data.record import BadRecord, Dropped, Record
from dalle_jax.data.sources import captions
from dalle_jax.data.sources.folder import FolderSource
from dalle_jax.errors import UserError

CAPTION_FEATURES = ("captions", "caption", "text", "description")
NAME_FEATURES = ("image/filename", "file_name", "filename", "image/id", "image_id", "id", "tfds_id")


def open_tfds(name: str, spec: str, *, captions_required: bool = True):
    """The source of 'NAME/SPLIT[@DATA_DIR]'; NAME may carry a config and version, SPLIT a slice such as train[:90%].

    Raises:
      UserError: the dataset is not there, not prepared for random access, or has no image feature.
    """
    dataset, _, data_dir = spec.partition("@")
    (dataset, _, split), data_dir = dataset.rpartition("/"), os.path.expanduser(data_dir)
    if not dataset or not split:
        raise UserError(f"expected tfds:NAME/SPLIT or tfds:NAME/SPLIT@DATA_DIR, got tfds:{spec}")
    if dataset == "image_folder":
        return LabelFolderSource(name, os.path.join(data_dir, split))
    return TfdsSource(name, dataset, split, data_dir or None, captions_required=captions_required)


class TfdsSource:
    """Records of one prepared split. See `record.Source`; a pickled copy opens the files again."""

    def __init__(self, name: str, dataset: str, split: str, data_dir: str | None, *, captions_required: bool = True):
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import example_parser, read_only_builder

        self.name, self._arguments, self._captions_required = name, (dataset, split, data_dir), captions_required
        try:
            builder = read_only_builder.builder_from_files(dataset, data_dir=data_dir)
            self._records = builder.as_data_source(
                split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
            )
        except Exception as error:  # tfds has no exception of its own for a missing dataset
            first = re.split(r"\.\s|\n", str(error).strip())[0]
            place = f" --data_dir={data_dir}" if data_dir else ""
            raise UserError(
                f"expected the prepared dataset {dataset}, split {split}, got {type(error).__name__} ({first}): "
                f"prepare it on a machine with TensorFlow: `tfds build {dataset} --file_format=array_record{place}`"
            ) from error
        features = self._records.dataset_info.features
        self._image = next((key for key, kind in features.items() if isinstance(kind, tfds.features.Image)), None)
        if self._image is None:
            raise UserError(
                f"expected an image feature in {dataset}, got {', '.join(features)}: choose another dataset"
            )
        self._texts = [key for key in CAPTION_FEATURES if key in features]
        self._labels = {key: kind for key, kind in features.items() if isinstance(kind, tfds.features.ClassLabel)}
        self._parser = example_parser.ExampleParserNp(features.get_serialized_info())
        self._lock = threading.Lock()
        if not len(self._records):
            raise UserError(f"expected records in {dataset}, split {split}, got none: choose another split")

    def __reduce__(self):
        open_again = functools.partial(TfdsSource, captions_required=self._captions_required)
        return open_again, (self.name, *self._arguments)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record | Dropped:
        index = range(len(self))[index]
        key = f"{self._arguments[1]}-{index:07d}"
        try:
            try:
                with self._lock:  # the file reader has one position
                    raw = self._records[index]
                fields = self._parser.parse_example(raw)
            except Exception as error:  # the library and the parser raise many kinds for damage
                raise BadRecord("unreadable file", f"{type(error).__name__}: {error}") from None
            given = next((fields[name] for name in NAME_FEATURES if name in fields), None)
            key = f"{key} {_text(given)}" if given is not None else key
            image = fields.get(self._image)
            if not image:
                raise BadRecord("zero bytes" if image == b"" else "no image", "the record's image feature is empty")
            return Record(key, image, self._captions(fields))
        except BadRecord as bad:
            return Dropped(key, bad.reason, bad.detail)

    def _captions(self, fields) -> tuple[str, ...]:
        try:
            texts = [text for name in self._texts for text in _leaves(fields.get(name))]
            if not self._texts:
                texts = [kind.int2str(int(fields[name])).replace("_", " ") for name, kind in self._labels.items()]
            if not texts:
                raise BadRecord("no caption", "no text feature and no class label holds anything")
            return captions.checked(texts)
        except BadRecord:
            if self._captions_required:
                raise
            return ()


class LabelFolderSource(FolderSource):
    """Images in one sub-folder per label; the label is the caption."""

    def _read_captions(self, path: str) -> tuple[str, ...]:
        label, inside, _ = path.partition(os.sep)
        return captions.checked([label.replace("_", " ") if inside else ""])


def _leaves(value) -> list[str]:
    """All texts in a nested feature, e.g. that of COCO: {'id': [...], 'text': [...]}."""
    if isinstance(value, dict):
        named = [name for name in CAPTION_FEATURES if name in value]
        return [text for name in named for text in _leaves(value[name])]
    if isinstance(value, (list, tuple, np.ndarray)):
        return [text for item in value for text in _leaves(item)]
    return [_text(value)] if isinstance(value, (bytes, str)) else []


def _text(value) -> str:
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord("not utf-8", str(error)) from None
