"""Ours beside its peers: speed, peak memory and correctness in one run.

    make bench                                        # everything; docs/bench and the README anew
    make bench QUICK=1                                # a look, on smaller shapes
    OMP_NUM_THREADS=1 python -m scripts.bench step --case 512,64,3 --output runs/bench

A *part* (step, profile, head, queue, cost) has *cases*; in a case, *variants* (ours and the
peers') do the same work in turns. A part is written as one JSON file, case by case; the table, the
pictures and the page are made from these files alone.
"""
