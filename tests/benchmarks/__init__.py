"Seconds, memory and operations of a step, beside a plain composition of the same method."
