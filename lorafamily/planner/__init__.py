"""What training will take, before anything is allocated. The door: `plan` for one method, `Planner` for several."""

from lorafamily.planner.costs import Memory, Plan, Use
from lorafamily.planner.plans import Planner, plan

__all__ = ["Memory", "Plan", "Planner", "Use", "plan"]
