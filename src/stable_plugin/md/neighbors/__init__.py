"""Neighbor graphs of batches of replicas, isolated or periodic."""

from stable_plugin.md.neighbors.edges import Edges, edges_within
from stable_plugin.md.neighbors.neighbor_list import NeighborList

__all__ = ["Edges", "NeighborList", "edges_within"]
