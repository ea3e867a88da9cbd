"""`hptjax upge`: what the rows of the table do on the same data, measured, and on a toy where the truth is known."""
