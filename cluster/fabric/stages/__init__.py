"""Stages of a diagnosis: each asks a fabric something and hands on what it learnt."""
