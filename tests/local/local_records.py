"""Training records for the tests of the local backend."""

from __future__ import annotations


def records(count: int) -> list[dict[str, str]]:
    words = ["river", "stone", "garden", "engine", "winter", "song", "bridge"]
    return [
        {
            "prompt": f"Q: {words[i % 7]} {i}\nA:",
            "completion": " " + " ".join(words[(i * j + j) % 7] for j in range(1, 2 + i % 5)) + ".",
        }
        for i in range(count)
    ]
