"""What happens when the store fails. The public names; each module says more."""

from backends.guard.emergency_booking import EmergencyBooking
from backends.guard.emergency_books import EmergencyBooks
from backends.guard.emergency_budget import EmergencyBudget
from backends.guard.guard import FailurePolicy, Guard, Health
from backends.guard.leased_budget import LeasedBudget
from backends.guard.lending import EMERGENCY

__all__ = [
    "EMERGENCY",
    "EmergencyBooking",
    "EmergencyBooks",
    "EmergencyBudget",
    "FailurePolicy",
    "Guard",
    "Health",
    "LeasedBudget",
]
