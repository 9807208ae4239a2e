"""Pictures of what a run left in its products folder. Needs matplotlib and pandas, and never torch."""
