"""A finished search for people: a Markdown page."""

import math
from typing import Any

from sparse_bwd.training.search.choosing import MIB, choosing_lines


def page(record: dict[str, Any]) -> str:
    """The tables of a search's results."""
    parts = [
        f"# {record['title']}",
        "\n".join(schemes_table(record)),
        "\n".join(biases_table(record)),
        "\n".join(layers_table(record)),
    ]
    if record["choosing"]["velocity"]:
        parts.append("\n".join(choosing_lines(record["choosing"])))
    versions = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
    parts.append(noise(record))
    parts.append(
        f"Accuracy on {record['images']['validation']} of the {sum(record['images'].values())} training images, none "
        f"of which was trained on; {record['images']['train']} images were. Device {record['device']}, threads "
        f"{' and '.join(map(str, record['threads']))}; {versions}."
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def noise(record: dict[str, Any]) -> str:
    """How far an accuracy may be off, because the validation images are few."""
    count, accuracy = record["images"]["validation"], record["head_accuracy"]
    error = 100 * math.sqrt(accuracy * (1 - accuracy) / count)
    runs = len(record["grid"]["seeds"])
    return (
        f"Each accuracy is of {runs} run{'s' if runs > 1 else ''} on {count} images: one image is {100 / count:.1f} "
        f"points, and the standard error that so few images alone bring is about {error:.1f}. Gains are differences on "
        "the same images, so that a part of it cancels; the rest is noise that the search takes for gain."
    )


def schemes_table(record: dict[str, Any]) -> list[str]:
    """What was found for each budget."""
    lines = [
        "| budget | biases of the last | convolutions at ratio | gain | weights | bytes of a step, MiB |",
        "|---|--:|---|--:|--:|--:|",
    ]
    for row in record["schemes"]:
        scheme = row["scheme"]
        pairs = zip(scheme["indices"], scheme["ratios"], strict=True)
        trained = ", ".join(f"{index}: {ratio:g}" for index, ratio in pairs) or "none"
        lines.append(
            f"| {row['budget']} | {scheme['n_bias']} | {trained} | {_points(row['gain'])} | {row['weights']:,} "
            f"| {row['bytes'] / MIB:.1f} |"
        )
    about = "The gain of a scheme is the sum of its parts' gains, in points of accuracy: it ranks schemes, no more."
    return [*lines, "", about]


def biases_table(record: dict[str, Any]) -> list[str]:
    """Gain of the last k biases."""
    rows = [row for row in record["contributions"] if row["conv"] is None]
    head = f"The classifier alone reaches {record['head_accuracy']:.2%}."
    if not rows:
        return [f"{head} Nothing in this network has a bias that a scheme could train."]
    return [
        head,
        "",
        "| biases of the last | gain over the classifier alone |",
        "|--:|--:|",
        *(f"| {row['n_bias']} | {_gain(row)} |" for row in rows),
    ]


def layers_table(record: dict[str, Any]) -> list[str]:
    """Gain of each layer at each ratio."""
    rows = [row for row in record["contributions"] if row["conv"] is not None]
    ratios = sorted({row["ratio"] for row in rows})
    lines = [
        f"Gain of a layer's weights over {rows[0]['over'] if rows else 'nothing'}, in points of accuracy:",
        "",
        f"| conv | layer | {' | '.join(f'{ratio:g}' for ratio in ratios)} |",
        f"|--:|---|{'--:|' * len(ratios)}",
    ]
    for conv in sorted({row["conv"] for row in rows}):
        of_conv = {row["ratio"]: row for row in rows if row["conv"] == conv}
        name = next(iter(of_conv.values()))["name"].rpartition(" at ratio ")[0]
        cells = [_gain(of_conv[ratio]) if ratio in of_conv else "" for ratio in ratios]
        lines.append(f"| {conv} | {name} | {' | '.join(cells)} |")
    return lines


def _gain(row: dict[str, Any]) -> str:
    error = "" if row["error"] is None else f" ± {100 * row['error']:.1f}"
    return "diverged" if row["diverged"] else f"{_points(row['gain'])}{error}"


def _points(gain: float) -> str:
    return f"{100 * gain:+.1f}"
