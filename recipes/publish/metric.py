"""The metric module as a Space that `evaluate.load` reads."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.arguments import UserError
from recipes.publish.folder import read_statement
from recipes.publish.sources import require
from recipes.record import code_commit

if TYPE_CHECKING:
    from recipes.publish.package import Files, PackageArguments

SOURCE = Path(__file__).parents[2] / "hub_cards" / "lrkd_relevance"


def package_metric(arguments: PackageArguments) -> Files:
    """Collect the module under the name of its repository, its card, a page and its requirements.

    Raises:
        UserError: The repository's name is no module name, or the module is missing.
        CardError: A fact is missing or cannot be.
    """
    from hub_cards.facts import MetricFacts, MissingFact
    from hub_cards.render import metric_card, metric_page

    statement = read_statement(arguments.facts, "metric")
    source = SOURCE if arguments.source is None else Path(arguments.source)
    name = arguments.repo_id.partition("/")[2]
    if not name.isidentifier():
        raise UserError(f"--repo_id {arguments.repo_id}: evaluate imports {name}.py; use letters, digits and _ only.")
    module = require(source / f"{source.resolve().name}.py", "the checkout")
    requirements = require(source / "requirements.txt", "the checkout")
    commit = code_commit()
    if commit is None:
        raise MissingFact("code_commit", source, "A git checkout")
    texts = _constants(module)
    facts = MetricFacts(
        repo_id=arguments.repo_id,
        statement=statement,
        description=texts["_DESCRIPTION"],
        inputs=texts["_KWARGS_DESCRIPTION"],
        code_commit=commit,
        requirements=requirements.read_text(encoding="utf-8").split(),
    )
    return {
        f"{name}.py": module,
        "requirements.txt": requirements,
        "README.md": metric_card(facts).encode(),
        "index.html": metric_page(facts).encode(),
    }


def _constants(module: Path) -> dict[str, str]:
    """Return the texts that a module of `evaluate` documents itself with.

    Raises:
        UserError: One is missing.
    """
    found = {
        node.targets[0].id: node.value.value
        for node in ast.parse(module.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    for name in ("_DESCRIPTION", "_KWARGS_DESCRIPTION"):
        if name not in found:
            raise UserError(f"{module}: lacks {name}, which the card shows.")
    return found
