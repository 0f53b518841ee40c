"""How `recipes.teacher.generate` works off a plan: requests to servers, or batches in process."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError, to_dict
from recipes.teacher.journal import Journal, Key, refuse_changes
from recipes.teacher.plan import Plan, Progress, Task, request_seed

if TYPE_CHECKING:
    from recipes.teacher.endpoint import Answer, Endpoint
    from recipes.teacher.generate import GenerateArguments

SAMPLING = ("temperature", "top_p", "top_k", "max_tokens")
# Refusals one after the other that mean that no request will ever be accepted.
REFUSALS_IN_A_ROW = 20


def common_settings(arguments: GenerateArguments) -> dict[str, Any]:
    """Return what all completions of one journal were made with, beside their prompts and what servers refuse."""
    values = to_dict(arguments)
    settings = {name: values[name] for name in ("backend", "model", *SAMPLING, "seed")}
    if arguments.backend == "transformers":
        from recipes.teacher.local import fingerprint

        settings |= fingerprint(arguments.model, arguments.revision, arguments.adapter)
    return settings


def _begin(journal: Journal, settings: dict[str, Any]) -> None:
    if journal.settings is None:
        journal.begin(settings)
    refuse_changes(journal.path, journal.settings, settings)


def _endpoint(arguments: GenerateArguments) -> Endpoint:
    from recipes.teacher.endpoint import Endpoint

    key = None
    if arguments.api_key_variable is not None:
        key = os.environ.get(arguments.api_key_variable)
        if not key:
            raise UserError(f"api_key_variable: the environment variable {arguments.api_key_variable} is not set.")
    urls = list(dict.fromkeys(arguments.base_url))
    return Endpoint(
        urls,
        arguments.model,
        key,
        timeout=arguments.timeout,
        patience=arguments.patience,
        backoff=arguments.backoff,
    )


async def reach(arguments: GenerateArguments) -> None:
    """Check that a server answers.

    Raises:
        UserError: None does.
    """
    async with _endpoint(arguments) as endpoint:
        await endpoint.reach()


async def ask_servers(
    arguments: GenerateArguments, settings: dict[str, Any], plan: Plan, journal: Journal, progress: Progress
) -> dict[Key, str]:
    """Ask servers, `concurrency` requests at once, one sample each: so every sample has a seed of its own.

    Returns:
        Why some completions could not be had.

    Raises:
        UserError: The servers are not there, do not have the model, accept other options than before, refuse
            everything, or have gone for longer than `patience`. The journal has all that had come.
    """
    async with _endpoint(arguments) as endpoint:
        values = to_dict(arguments)
        endpoint.say = progress.bar.write
        refused = await endpoint.start({name: values[name] for name in SAMPLING})
        if refused:
            progress.bar.write(f"not accepted by the server, which takes its own default: {', '.join(refused)}")
        _begin(journal, {**settings, "refused": sorted(refused)})
        sampling = endpoint.options | {name: "server default" for name in refused if name != "seed"}
        with_seeds = "seed" not in refused
        work = _Work(endpoint, plan.tasks(journal.done), journal, progress, sampling, arguments.seed, with_seeds)
        workers = [asyncio.ensure_future(work.run()) for _ in range(min(arguments.concurrency, len(plan)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return work.missing


class _Work:
    """What the workers share: the tasks that are left, and what came of the others."""

    def __init__(
        self,
        endpoint: Endpoint,
        tasks: Iterator[Task],
        journal: Journal,
        progress: Progress,
        sampling: dict[str, Any],
        seed: int,
        with_seeds: bool,
    ) -> None:
        self.endpoint, self.tasks, self.journal, self.progress = endpoint, tasks, journal, progress
        self.sampling, self.seed, self.with_seeds = sampling, seed, with_seeds
        self.missing: dict[Key, str] = {}
        self.refusals = 0

    async def run(self) -> None:
        """Ask for one completion after the other; each is in the journal before this worker asks for the next."""
        from recipes.teacher.endpoint import Refused

        for task in self.tasks:
            seed = request_seed(self.seed, *task.key) if self.with_seeds else None
            try:
                answer = await self.endpoint.complete(task.messages, seed)
            except Refused as error:
                self._miss(task, str(error))
                continue
            self.refusals = 0
            sampling = self.sampling if seed is None else {**self.sampling, "seed": seed}
            _keep(self.journal, self.progress, [task], [answer], sampling)

    def _miss(self, task: Task, reason: str) -> None:
        self.missing[task.key] = reason
        self.refusals += 1
        if self.refusals >= REFUSALS_IN_A_ROW:
            raise UserError(
                f"{self.refusals} requests in a row were refused, the last one with: {reason}. "
                f"{len(self.journal.done):,} completions are kept in {self.journal.path}."
            )


def ask_model(
    arguments: GenerateArguments, settings: dict[str, Any], plan: Plan, journal: Journal, progress: Progress
) -> dict[Key, str]:
    """Complete in process, batch by batch.

    Batches are cut from the whole plan and seeded by their first task, so that a run that was killed goes on with the
    same batches and ends with the same completions as one that was not.

    Returns:
        Why some completions could not be had.

    Raises:
        UserError: The model, its tokenizer or its adapter cannot be used, or a batch does not fit into memory.
    """
    import torch

    from recipes.teacher.local import LocalModel

    model = LocalModel(arguments.model, arguments.revision, arguments.adapter, arguments.device)
    _begin(journal, {**settings, "refused": []})
    values = to_dict(arguments)
    options = {name: values[name] for name in SAMPLING}
    missing: dict[Key, str] = {}
    for batch in plan.batches(arguments.batch_size, journal.done):
        lengths = [model.prompt_tokens(task.messages) + arguments.max_tokens for task in batch]
        fitting = [task for task, length in zip(batch, lengths, strict=True) if length <= model.max_length]
        for task, length in zip(batch, lengths, strict=True):
            if length > model.max_length:
                missing[task.key] = f"prompt and max_tokens take {length} tokens, the model {model.max_length}"
        if not fitting:
            continue
        seed = request_seed(arguments.seed, *batch[0].key)
        try:
            answers = model.complete([task.messages for task in fitting], options, seed)
        except torch.OutOfMemoryError:
            raise UserError(
                f"batch_size: {arguments.batch_size} prompts do not fit into the GPU's memory at once; pass a smaller "
                f"one. {len(journal.done):,} completions are kept in {journal.path}."
            ) from None
        _keep(journal, progress, fitting, answers, {**options, "seed": seed, "batch_size": len(fitting)})
    return missing


def _keep(
    journal: Journal, progress: Progress, tasks: Sequence[Task], answers: Sequence[Answer], sampling: dict[str, Any]
) -> None:
    """Write answers down; one that stood there before a kill, and came again with its batch, is left out."""
    fresh = [pair for pair in zip(tasks, answers, strict=True) if pair[0].key not in journal.done]
    used = json.dumps(sampling, sort_keys=True)
    journal.append([task.record(a.text, used, a.finish_reason, a.completion_tokens) for task, a in fresh])
    progress.add(len(fresh), sum(answer.completion_tokens for _, answer in fresh))
