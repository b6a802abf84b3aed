"""The loop of a training and what it measures: steps, rates, averages, evaluation."""
