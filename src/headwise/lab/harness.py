"""Any task of lm-eval (the Language Model Evaluation Harness, Gao et al. 2021, doi:10.5281/zenodo.5371628), asked of a
model of ours: no export, and every attention and cache of the registry.

Needs the extra `eval`. Tasks fetch their data themselves, most of them from the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from headwise.data.chat import render_chat
from headwise.errors import DataError, SettingsError, nearest
from headwise.generate.batch import answers
from headwise.generate.decode import evaluating
from headwise.generate.request import Generation, Request
from headwise.generate.sampling import Sampling

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from headwise.data import Tokenizer
    from headwise.model.base import LanguageModel

_NEW_TOKENS = 256  # where a task does not say
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")


class HarnessModel(TemplateLM):
    """A decoder and its tokenizer as lm-eval asks them.

    Args:
        batch_size: texts in one pass.

    A text longer than the model's `max_seq_len` loses its beginning, as lm-eval's own models do it.

    Raises:
        SettingsError: no decoder.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, batch_size: int = 8) -> None:
        super().__init__()
        if model.spec.architecture != "decoder":
            raise SettingsError(f"tasks: lm-eval asks a decoder, and this is an {model.spec.architecture}")
        self.model, self.words, self.batch_size = model, tokenizer, batch_size
        self.max_length = model.spec.dims.max_seq_len

    @property
    def eot_token_id(self) -> int:
        if self.words.eos_id is None:
            raise DataError(
                f"tasks: this one scores a text from its first token on, and the model's {self.words.kind} tokenizer "
                "has no token that stands between texts; train it on several documents"
            )
        return self.words.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.words.begin_ids[0] if self.words.begin_ids else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.words.fingerprint[:16]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        begin = () if add_special_tokens is False else self.words.begin_ids
        return [*begin, *map(int, self.words.encode(string, special=True))]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.words.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self.words.chat_template is None:
            raise SettingsError("chat: this model has no chat template; leave chat out")
        ends = {role: self.words.special_tokens.get(role, "") for role in ("bos_token", "eos_token")}
        return render_chat(self.words.chat_template, chat_history, add_generation_prompt=add_generation_prompt, **ends)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        """For each (…, context, continuation): the continuation's log-probability, and whether greedy decoding gives
        it. Texts of like length are read together, padded behind their ends, where a decoder does not see it."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda n: -len(requests[n][1]) - len(requests[n][2]))
        with evaluating(self.model), torch.inference_mode():
            for first in range(0, len(order), self.batch_size):
                places = order[first : first + self.batch_size]
                texts = [(requests[n][1] + requests[n][2])[-self.max_length - 1 :] for n in places]
                longest = max(map(len, texts)) - 1
                ids_BT = torch.tensor([text[:-1] + [0] * (longest + 1 - len(text)) for text in texts])
                logits_BTV = self.model(ids_BT.to(self.model.embedding.weight.device))
                for place, text, logits_TV in zip(places, texts, logits_BTV):
                    n = min(len(requests[place][2]), len(text) - 1)
                    wanted_N = torch.tensor(text[len(text) - n :], dtype=torch.int64)
                    logs_NV = logits_TV[len(text) - 1 - n : len(text) - 1].float().log_softmax(-1).cpu()
                    greedy = bool((logs_NV.argmax(-1) == wanted_N).all())
                    found[place] = float(logs_NV.gather(1, wanted_N[:, None]).sum()), greedy
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[str, list[int], list[int]]] = []
        owners = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append(("", *make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows)):
            sums[owner] += logprob
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        asked = [self._request(place, *request.args) for place, request in enumerate(requests)]
        texts = [""] * len(asked)
        for place, result in answers(self.model, self.words, asked, batch_size=self.batch_size):
            if not isinstance(result, Generation):
                raise result
            texts[place] = result.text
        return texts

    def _request(self, place: int, context: str, options: dict[str, Any]) -> Request:
        until = options.get("until") or []
        n_new = min(next((options[name] for name in _LENGTHS if name in options), _NEW_TOKENS), self.max_length - 1)
        drawn = options.get("do_sample", False)
        sampling = Sampling(
            temperature=options.get("temperature", 1.0) if drawn else 0.0,
            top_p=options.get("top_p") if drawn else None,
            top_k=options.get("top_k") if drawn else None,
        )
        ids = self.tok_encode(context)[-(self.max_length - n_new) :]
        stop = [until] if isinstance(until, str) else [each for each in until if each]
        return Request(ids, sampling, max_new_tokens=n_new, stop=stop, index=place)


def evaluate_tasks(
    model: LanguageModel,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    batch_size: int = 8,
) -> dict[str, dict[str, Any]]:
    """What lm-eval finds: {task: {"metric,filter": value, "metric_stderr,filter": …}}.

    Args:
        tasks: names of tasks or groups.
        include_path: a folder of tasks of one's own (YAML), which are looked for first.
        shots: examples before each question; None: as the task says.
        limit: only so many questions of each task.
        chat: write the questions with the model's chat template.

    Raises:
        SettingsError: a task that is not there, no decoder, no chat template.
        DataError: a task's data cannot be fetched.
    """
    asked = HarnessModel(model, tokenizer, batch_size)
    if chat and tokenizer.chat_template is None:
        raise SettingsError("chat: this model has no chat template; leave chat out")
    manager = _manager(tasks, include_path)
    try:
        found = simple_evaluate(
            asked,
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            apply_chat_template=chat,
            task_manager=manager,
            log_samples=False,
        )
    except (OSError, ValueError) as error:  # the datasets library's own have no other base class in common
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = f"tasks: lm-eval cannot do {', '.join(tasks)}"
        raise DataError(f"{what}: {line}; check its data and the network") from None
    assert found is not None
    return {
        name: {metric: value for metric, value in values.items() if isinstance(value, int | float)}
        for name, values in found["results"].items()
    }


def _manager(tasks: Sequence[str], include_path: Path | None) -> TaskManager:
    """What knows these tasks. The harness's own, whose list takes it a while, are looked up only if they are needed."""
    if include_path is not None and not include_path.is_dir():
        raise SettingsError(f"include_path: {include_path} is no folder; give the one with the tasks' YAML files")
    manager = None
    for defaults in (False, True) if include_path is not None else (True,):
        manager = TaskManager(include_path=include_path, include_defaults=defaults)
        missing = [name for name in tasks if not manager.match_tasks([name])]
        if not missing:
            return manager
    assert manager is not None
    raise SettingsError(
        f"tasks: lm-eval knows no {missing[0]!r}{nearest(missing[0], manager.all_tasks)}; see `lm_eval ls tasks`"
    )
