"""Faults on purpose: seeded schedules of kills, full disks and damaged files against the real jobs.

python -m tests.integration.faults --schedules 200 --seed 0
"""
