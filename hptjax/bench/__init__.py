"""`hptjax bench`: what a step costs as the work grows, measured point by point, as raw figures, tables and a plot."""
