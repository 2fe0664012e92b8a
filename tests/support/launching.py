"""Launch scripts as a user calls them, in an environment of a machine without a card."""

import subprocess


def launch(repo, script, environment, *overrides, **variables):
    return subprocess.run(
        ["bash", str(repo / "scripts" / script), *overrides],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=False,
        cwd=repo,
    )
