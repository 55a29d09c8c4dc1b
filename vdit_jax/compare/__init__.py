"""A released pipeline run by PyTorch and by us, compared stage by stage.

  job -> ours (a process) -> noise, Run
      -> baseline (a process, the only one with torch) -> Run
      -> stages: errors, seconds, memory -> report: HTML, mp4, JSON

Each side is a process of its own: neither holds the other's memory, so that
its peak is its own, and a TPU is held by ours alone.
"""
