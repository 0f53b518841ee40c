"""What the page shows, as HTML. Every text that is not ours goes through `escape`."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

SHOWN_ROWS = 50
CHARTED = 60

PAPER = "https://arxiv.org/abs/2601.21611"
PERSPECTIVES = {
    "user_intent": ("user intent", "what the shopper would use it for"),
    "structured_analysis": ("structured analysis", "attributes compared one by one"),
    "business_rule": ("business rule", "the marketplace's rules, such as main product or accessory"),
    "unified": ("unified reasoning", "all perspectives in one"),
}

EXAMPLES = '<p class="lr-kicker">Examples</p>'

Result = dict[str, Any]


def escape(text: object) -> str:
    """Return `text` as HTML that shows it as it is, wherever it is put.

    Braces and dollar signs too: Gradio's HTML component has templates, and no title may become one.

    >>> escape("<b> & ${x} {{y}}")
    '&lt;b&gt; &amp; &#36;&#123;x&#125; &#123;&#123;y&#125;&#125;'
    """
    escaped = html.escape(str(text), quote=True)
    for character in "{}$`":
        escaped = escaped.replace(character, f"&#{ord(character)};")
    return escaped


def header() -> str:
    """Return the head of the page."""
    return f"""
<header class="lr-header">
  <h1>Think broad, act fast</h1>
  <p>Says in milliseconds how well a product answers a shopping query, with a small model that carries a large
  model's reasoning as one vector.</p>
  <nav aria-label="Background"><a href="{PAPER}" target="_blank" rel="noopener">The paper</a></nav>
</header>"""


def model_line(name: str, labels: Sequence[str], parameters: int, extractor: str, is_local: bool) -> str:
    """Return one line about the model in use, with the link to its card."""
    path, _, revision = (name, "", "") if is_local else name.partition("@")
    address = f"https://huggingface.co/{path}" + (f"/tree/{revision}" if revision else "")
    card = f"<code>{escape(name)}</code>"
    if not is_local:
        card = f'<a href="{escape(address)}" target="_blank" rel="noopener">Model card: {escape(name)}</a>'
    facts = (f"{parameters / 1e6:.1f} M parameters", f"{escape(extractor)} extractor", f"{len(labels)} labels")
    return f'<p class="lr-model">{card}{"".join(f"<span>{fact}</span>" for fact in facts)}</p>'


def error(message: object) -> str:
    """Return an error that the visitor can correct."""
    return f'<div class="lr-error" role="alert"><strong>That did not work.</strong> {escape(message)}</div>'


def empty_pair(labels: Sequence[str]) -> str:
    """Return the place of the result before there is one: of the same height, so that nothing jumps."""
    rows = "".join(_bar(label, None, number, len(labels)) for number, label in enumerate(labels))
    return f"""
<section class="lr-result lr-empty" aria-label="Result">
  <div class="lr-verdict"><p class="lr-kicker">Relevance</p><p class="lr-label">No pair yet</p></div>
  <div class="lr-bars">{rows}</div>
  <p class="lr-note">Type a query and a product, or pick an example.</p>
</section>"""


def pair(
    result: Result, labels: Sequence[str], milliseconds: float, tiers: int | None, is_calibrated: bool = False
) -> str:
    """Return the result of one pair: label, probabilities, tier, latency, nearest perspective, nearest rationales.

    Args:
        result: One product as the `lrkd-relevance` pipeline returns it.
        labels: The labels, best first.
        milliseconds: How long the model took.
        tiers: How many tiers the model has; None: it has none.
        is_calibrated: Its probabilities were fitted to how often they come true.
    """
    calibrated = ", calibrated probability" if is_calibrated else ""
    probabilities = result["probabilities"]
    rows = "".join(_bar(label, probabilities[label], number, len(labels)) for number, label in enumerate(labels))
    facts = [("Expected gain", f"{result['score']:.3f}")]
    if result.get("tier") is not None:
        facts.append(("Tier", f"{result['tier']}<small> of 0 to {(tiers or 1) - 1}</small>"))
    facts.append(("Latency", f"{milliseconds:,.1f}<small> ms</small>"))
    listed = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    return f"""
<section class="lr-result" aria-label="Result">
  <div class="lr-verdict"><p class="lr-kicker">Relevance{calibrated}</p>
    <p class="lr-label">{escape(result["label"])} <span>{probabilities[result["label"]]:.1%}</span></p></div>
  <div class="lr-bars">{rows}</div>
  <dl class="lr-facts">{listed}</dl>
  {_perspectives(result.get("perspectives"))}
  {_explanations(result.get("explanations"), labels)}
</section>"""


def empty_ranking() -> str:
    """Return the place of the ranking before there is one."""
    return """
<section class="lr-ranking lr-empty" aria-label="Ranking">
  <p class="lr-note">The ranking appears here: a chart, a table, and a CSV with every column.</p>
</section>"""


def ranking(query: str, results: Sequence[Result], labels: Sequence[str], milliseconds: float) -> str:
    """Return a ranked list: what it took, a chart, and a table of the first `SHOWN_ROWS` products."""
    count = len(results)
    each = f", {milliseconds / count:,.1f} ms each" if count > 1 else ""
    noun = "product" if count == 1 else "products"
    has_tiers = any(result.get("tier") is not None for result in results)
    rows = "".join(_row(result, labels, has_tiers) for result in results[:SHOWN_ROWS])
    tier_head = '<th scope="col" class="lr-number">Tier</th>' if has_tiers else ""
    more = f'<p class="lr-note">The first {SHOWN_ROWS} of {count}. The CSV has all.</p>' if count > SHOWN_ROWS else ""
    return f"""
<section class="lr-ranking" aria-label="Ranking">
  <p class="lr-summary"><strong>{count} {noun}</strong> for
    <bdi>{escape(query)}</bdi><span class="lr-time">{milliseconds:,.0f} ms{each}</span></p>
  {_chart(results, labels)}
  <table class="lr-table">
    <caption class="lr-hidden">Products for {escape(query)}, best first</caption>
    <thead><tr><th scope="col" class="lr-number">Rank</th><th scope="col">Product</th><th scope="col">Label</th>
      <th scope="col" class="lr-number">Gain</th>{tier_head}<th scope="col">Probabilities</th></tr></thead>
    <tbody>{rows}</tbody>
  </table>{more}
</section>"""


def snippet(source: str) -> str:
    """Return the client code, for the address or the Space name `source`."""
    code = f'''from gradio_client import Client

client = Client("{source}")
pair = client.predict("wireless earbuds", "Silicone case for earbuds", api_name="/score")
print(pair["label"], pair["probabilities"])

titles = ["Silicone case for earbuds", "Wireless earbuds, 30 h battery"]
for product in client.predict("wireless earbuds", titles, api_name="/rank"):
    print(product["rank"], product["title"], product["label"], product["score"])
'''
    return f'<pre class="lr-code" tabindex="0" aria-label="Python client"><code>{escape(code)}</code></pre>'


def _shade(number: int, count: int) -> str:
    """Style of the label at place `number` of `count`: the accent for the best, grey for the worst."""
    return f"--strength:{100 - 100 * number / max(count - 1, 1):.0f}%"


def _bar(label: str, probability: float | None, number: int, count: int) -> str:
    percent = "–" if probability is None else f"{probability:.1%}"
    return f"""<div class="lr-bar" style="{_shade(number, count)}"><span class="lr-bar-name">{escape(label)}</span>
      <span class="lr-track" aria-hidden="true"><span class="lr-fill" style="width:{100 * (probability or 0):.2f}%">
      </span></span><span class="lr-bar-value">{percent}</span></div>"""


def _perspectives(closeness: dict[str, float] | None) -> str:
    """Say which perspective the latent reasoning lies closest to: where it lies, not why the label was chosen."""
    if not closeness:
        return """<p class="lr-note">This model was saved without its teacher's perspectives, so what its reasoning
          vector lies close to cannot be said.</p>"""
    ordered = sorted(closeness.items(), key=lambda item: -item[1])
    name, meaning = PERSPECTIVES.get(ordered[0][0], (ordered[0][0], ""))
    meaning = f" ({escape(meaning)})" if meaning else ""
    others = "".join(f"; {escape(PERSPECTIVES.get(key, (key, ''))[0])} {value:.2f}" for key, value in ordered[1:])
    return f"""<p class="lr-note">The reasoning vector lies closest to
      <strong>{escape(name)}</strong>{meaning}: cosine {ordered[0][1]:.2f}{others}. This says where the vector lies, not
      why the label was chosen.</p>"""


def _explanations(found: Sequence[dict[str, Any]] | None, labels: Sequence[str]) -> str:
    """Show the nearest rationales of the bank, each with its verdict on its own pair and how near it is."""
    if not found:
        return ""
    quotes = "".join(_quote(one, labels) for one in sorted(found, key=lambda one: -one["similarity"]))
    return f"""<section class="lr-reasons" aria-labelledby="lr-reasons-title">
    <h2 id="lr-reasons-title">Reasoning the model stands close to</h2>
    <p class="lr-note">Written by the teacher about other products in training, and found by this pair's reasoning
      vector. Not the model's own words.</p>
    <ul>{quotes}</ul>
  </section>"""


def _quote(one: dict[str, Any], labels: Sequence[str]) -> str:
    name, _ = PERSPECTIVES.get(one["perspective"], (one["perspective"], ""))
    known = one["label"] in labels
    shade = _shade(labels.index(one["label"]) if known else len(labels) - 1, len(labels))
    return f"""<li><p class="lr-reason-head"><strong>{escape(name)}</strong>
      <span class="lr-verdict-chip" style="{shade}">argues for {escape(one["label"])}</span>
      <span class="lr-near">similarity {one["similarity"]:.2f}</span></p>
      <blockquote><bdi>{escape(one["rationale"])}</bdi></blockquote></li>"""


def _mix(result: Result, labels: Sequence[str]) -> str:
    """Return the probabilities of one product as one bar, best label first."""
    parts = "".join(
        f'<i style="{_shade(number, len(labels))};width:{100 * result["probabilities"][label]:.2f}%"></i>'
        for number, label in enumerate(labels)
    )
    words = ", ".join(f"{label} {result['probabilities'][label]:.1%}" for label in labels)
    return f'<span class="lr-mix" role="img" aria-label="{escape(words)}" title="{escape(words)}">{parts}</span>'


def _row(result: Result, labels: Sequence[str], has_tiers: bool) -> str:
    shade = _shade(labels.index(result["label"]), len(labels))
    identity = f"<small>{escape(result['product_id'])}</small>" if result.get("product_id") is not None else ""
    tier = f'<td class="lr-number lr-tier" data-name="Tier">{result.get("tier", "")}</td>' if has_tiers else ""
    return f"""<tr><td class="lr-number lr-rank">{result["rank"]}</td>
      <td class="lr-title"><bdi>{escape(result["title"])}</bdi>{identity}</td>
      <td class="lr-chip"><span style="{shade}">{escape(result["label"])}</span></td>
      <td class="lr-number lr-gain" data-name="Gain">{result["score"]:.3f}</td>{tier}
      <td class="lr-mixed">{_mix(result, labels)}</td></tr>"""


def _column(result: Result, labels: Sequence[str], top: float) -> str:
    shade = _shade(labels.index(result["label"]), len(labels))
    words = f"{result['rank']}. {result['title'][:80]}: {result['score']:.3f}"
    return f'<i style="{shade};height:{100 * result["score"] / top:.2f}%" title="{escape(words)}"></i>'


def _chart(results: Sequence[Result], labels: Sequence[str]) -> str:
    """Return the expected gain by rank, one column a product, coloured by label, with a key."""
    charted = results[:CHARTED]
    top = max(1.0, *(result["score"] for result in charted))
    columns = "".join(_column(result, labels, top) for result in charted)
    counts = [(label, sum(result["label"] == label for result in results)) for label in labels]
    key = "".join(
        f'<li style="{_shade(number, len(labels))}"><i></i>{escape(label)} <b>{count}</b></li>'
        for number, (label, count) in enumerate(counts)
    )
    words = "Expected gain by rank: " + ", ".join(f"{label} {count}" for label, count in counts)
    range_text = f"1 to {len(charted)}" if len(charted) > 1 else "1"
    return f"""<figure class="lr-chart"><div class="lr-plot" role="img" aria-label="{escape(words)}">
      <span class="lr-axis">{top:.1f}</span><span class="lr-axis">0</span><div class="lr-columns">{columns}</div></div>
      <figcaption><span>Expected gain, rank {range_text}</span><ul>{key}</ul></figcaption></figure>"""
