"""Two tokenizers over one text: the characters between borders that both have are a segment of both.

    text        t h e   w a r d e n
    tokens a    the| ward|en            segments   0 0 … : [the] [ warden]
    tokens b    t|he| war|den

A *border* of a tokenizer is a place that no token of it lies across. Between two common borders the one may have
another number of tokens than the other; a student's tokens there are compared with the teacher's stretched over them
(`distill.TimeWarper`). Where the tokenizers agree each token is a segment, and the stretching is the identity.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from headwise.data.pack import token_dtype
from headwise.data.tokenizers import RustBackedTokenizer, Tokenizer
from headwise.errors import DataError

if TYPE_CHECKING:
    import torch

    from headwise.data.windows import Windows

# What tells tokenizers of one vocabulary apart: words, cases, numbers, runs of spaces, signs, other scripts.
_PROBE = "The quick brown Fox's  jumped\tover 1234567 lazy dogs — don't?!\n\n   «Ünïcödé» 漢字 😀 x=y_1; #### 72\n"

_PROBED = 4096  # words of the vocabulary beside that, at most

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Aligned:
    """One text in two tokenizers: ids and segments int64 [n_a], [n_b]; both have the segments 0 … n − 1, ascending."""

    ids_a: Ints
    segments_a: Ints
    ids_b: Ints
    segments_b: Ints


def align(text: str, a: Tokenizer, b: Tokenizer, *, special: bool = False) -> Aligned:
    """Cut at the borders that both tokenizations of `text` have. Raises DataError for text that one cannot encode."""
    (ids_a, places_a), (ids_b, places_b) = (each.encode_places(text, special=special) for each in (a, b))
    segments_a, segments_b = _segments(places_a, places_b)
    return Aligned(ids_a, segments_a, ids_b, segments_b)


def same_vocabulary(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether both give the same ids to the same text, so that nothing needs to be aligned."""
    if a.fingerprint == b.fingerprint:
        return True
    if not (isinstance(a, RustBackedTokenizer) and isinstance(b, RustBackedTokenizer)):
        return False
    words_a, words_b = (each.rust.get_vocab(with_added_tokens=True) for each in (a, b))
    if words_a != words_b:
        return False
    ids = sorted(words_a.values())
    probe = _PROBE + a.decode(ids[:: len(ids) // _PROBED + 1])  # the same words may be put together in other ways
    return np.array_equal(a.encode(probe), b.encode(probe))


def _segments(places_a: Ints, places_b: Ints) -> tuple[Ints, Ints]:
    """The segment of each token of both, from the characters they stand for, [n, 2]."""
    begins_a, begins_b = _begins(places_a), _begins(places_b)
    common = np.intersect1d(begins_a, begins_b)
    return np.searchsorted(common, begins_a, side="right") - 1, np.searchsorted(common, begins_b, side="right") - 1


def _begins(places: Ints) -> Ints:
    """The border at or before each token. What a tokenizer leaves out, as blanks, belongs to the token after it."""
    ends = np.maximum.accumulate(np.append(0, places[:, 1])[: len(places)])  # of all tokens before
    return np.maximum.accumulate(np.where(places[:, 0] >= ends, ends, 0))


# ---- the windows of a split, as a teacher reads them ----


@dataclass(frozen=True)
class TeacherBatch:
    """Windows as the teacher's tokenizer has them.

    `ids`: int64 [B, T_t], 0 at padding. `lengths`: int64 [B]. `segments`: int64 [B, T_t], and `student_segments`
    [B, T]: of the teacher's and of the student's tokens, −1 where there is nothing to compare (padding, begin and end
    tokens, what the window's border cuts through).
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    segments: torch.Tensor
    student_segments: torch.Tensor


class TeacherWindows:
    """The windows of a split in the tokens of another tokenizer.

    Args:
        windows: of a split that knows its texts (`load_examples(…, keep_texts=True)` for plain text).
        student, teacher: the split's tokenizer, and the one that reads it anew.

    Attributes:
        lengths: int64 [n], the teacher's tokens of each window; `seq_len`, the most of them.
        fingerprint: of these tokens and segments.

    Raises:
        DataError: the split keeps no texts, or one that the teacher's tokenizer cannot encode.
    """

    def __init__(self, windows: Windows, student: Tokenizer, teacher: Tokenizer) -> None:
        split = windows.split
        if split.places is None:
            raise DataError(
                f"{split.name}: the teacher's {teacher.kind} tokenizer of {teacher.vocab_size:,} ids is not the "
                f"student's {student.kind} tokenizer of {student.vocab_size:,}, and without the texts nothing aligns "
                "them; load the data with keep_texts"
            )
        self.windows, self.begin = windows, np.array(teacher.begin_ids, np.int64)
        self.own = np.full(len(split), -1)  # the segment of each of the student's tokens
        ids, segments = [], []
        for example, start, stop in zip(split.texts, split.starts, split.stops):
            try:
                tokens, places = teacher.encode_places(example.text, special=example.special)
            except DataError as error:
                raise DataError(f"{example.where}: the teacher's tokenizer: {error}") from None
            inside = slice(start, stop) if example.special else _inside(student, start, stop)
            self.own[inside], theirs = _segments(split.places[inside], places)
            ids.append(tokens)
            segments.append(theirs)
        counts = np.array([len(tokens) for tokens in ids])
        self._stops = np.cumsum(counts)
        self._starts = self._stops - counts
        self._ids = np.concatenate(ids).astype(token_dtype(teacher.vocab_size))
        self._segments = np.concatenate(segments)
        self._low, self._high = self._whole_segments()
        self.lengths = self._high - self._low + len(self.begin)
        self.seq_len = int(self.lengths.max())
        digest = hashlib.sha256(teacher.fingerprint.encode())
        for array in (self._ids, self._segments, self.own, self._low, self._high):
            digest.update(np.ascontiguousarray(array).tobytes())
        self.fingerprint = digest.hexdigest()[:32]

    def _whole_segments(self) -> tuple[Ints, Ints]:
        """From where to where, in the teacher's tokens, each window has segments whose every student token it reads."""
        low, high = np.zeros((2, len(self.windows)), np.int64)
        split = self.windows.split
        for row, (example, start, length) in enumerate(
            zip(self.windows.example, self.windows.starts, self.windows.lengths)
        ):
            first, last = self._ends(start, length, split.starts[example], split.stops[example])
            theirs = self._segments[self._starts[example] : self._stops[example]]
            low[row] = self._starts[example] + np.searchsorted(theirs, first)
            high[row] = max(self._starts[example] + np.searchsorted(theirs, last, side="right"), low[row])
        return low, high

    def _ends(self, start: int, length: int, begin: int, end: int) -> tuple[int, int]:
        """The first and the last segment that lie wholly in these of the student's tokens; the last may be less."""
        own = self.own[start : start + length]
        known = own[own >= 0]
        if not len(known):
            return 0, -1
        first, last = int(known[0]), int(known[-1])
        first += start > begin and self.own[start - 1] == first
        last -= start + length < end and self.own[start + length] == last
        return first, last

    def batch(self, rows: NDArray[np.int64]) -> TeacherBatch:
        """The windows of these numbers, padded to `seq_len`, with the student's segments, [B, windows.seq_len]."""
        import torch

        rows = np.asarray(rows, dtype=np.int64)
        n_begin, lengths = len(self.begin), self.lengths[rows]
        ids = np.zeros((len(rows), self.seq_len), np.int64)
        theirs = np.full((len(rows), self.seq_len), -1)
        own = np.full((len(rows), self.windows.seq_len), -1)
        for place, (row, length) in enumerate(zip(rows, lengths)):
            held = slice(self._low[row], self._high[row])
            ids[place, :n_begin], ids[place, n_begin:length] = self.begin, self._ids[held]
            theirs[place, n_begin:length] = segments = self._segments[held]
            start, count = self.windows.starts[row], self.windows.lengths[row]
            mine = self.own[start : start + count]
            own[place, :count] = np.where(np.isin(mine, segments), mine, -1)
        made = [torch.from_numpy(each) for each in (ids, lengths, theirs, own)]
        return TeacherBatch(*made)


def _inside(tokenizer: Tokenizer, start: int, stop: int) -> slice:
    """An example's tokens without those that begin and end every text."""
    return slice(start + len(tokenizer.begin_ids), stop - (tokenizer.eos_id is not None))
