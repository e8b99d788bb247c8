"""All experiments, and what docs/results.md says of them.

python -m tests.results.all --seeds 0 1 2 --runs FOLDER

Rewrites what lies between the two markers of docs/results.md, and the plots beside it.
"""

from collections.abc import Mapping
from pathlib import Path

from cluster.run_directory import write_atomically
from tests.results import (
    distillation,
    ghost_attention,
    over_optimisation,
    prior_rounds,
    real_rewards,
    reward_models,
    rounds,
    sampling,
)
from tests.results.experiment import Experiment, Shown, command_line

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results.md"
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"
EXPERIMENTS = {
    "Reward models": reward_models.EXPERIMENT,
    "Rejection sampling": sampling.EXPERIMENT,
    "Ghost Attention": ghost_attention.EXPERIMENT,
    "Context distillation": distillation.EXPERIMENT,
    "Over-optimisation": over_optimisation.EXPERIMENT,
}
REAL = "Real preferences"
LONG = {
    "Rounds V1 to V5": rounds.EXPERIMENT,
    "Samples of prior rounds": prior_rounds.EXPERIMENT,
}
"""Experiments that take most of an hour a seed; the others take minutes."""


def write(parts: Mapping[str, Shown], page: Path) -> None:
    """Put tables and plots into the page. Raises `ValueError` where it lacks a marker."""
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} lacks the line {BEGIN} or {END}; put both back.")
    sections = []
    for title, shown in parts.items():
        section = f"### {title}\n\n{shown.text}"
        for name, plot in shown.plots.items():
            plot.write(page.parent / "results" / name)
            section += f"\n\n![{plot.y_title} against {plot.x_title}](results/{name})"
        sections.append(section)
    body = "\n\n".join(sections)
    write_atomically(page, f"{before}{BEGIN}\n\n{body}\n\n{END}{after}")


def main() -> None:
    """Measure what is missing; the page is written anew after each experiment."""
    parser = command_line(__doc__ or "")
    parser.add_argument("--groups", type=int, nargs="*", default=[real_rewards.GROUPS - 1])
    given = parser.parse_args()
    parts: dict[str, Shown] = {}

    def measure(experiments: Mapping[str, Experiment]) -> None:
        for title, experiment in experiments.items():
            parts[title] = experiment.show(experiment.run(given.runs, given.seeds))
            write(parts, PAGE)

    measure(EXPERIMENTS)
    if real_rewards.PAIRS.is_file() and given.groups:
        recipe = real_rewards.Recipe()
        found = real_rewards.run(given.runs, given.groups, given.seeds, recipe)
        parts[REAL] = real_rewards.show(found)
        write(parts, PAGE)
    measure(LONG)


if __name__ == "__main__":
    main()
