"""Questions of different lengths for tests with real models."""

QUESTIONS = (
    "What is 12 + 30?",
    "What is the capital of France?",
    "A farmer has 17 sheep and buys 5 more, then sells 9. How many sheep does he have now? Think step by step.",
    "Write a short poem about the sea.",
    "List three prime numbers larger than 10 and explain why each of them is prime.",
    "Translate to German: The weather is nice today.",
    "Explain in one sentence what photosynthesis is.",
    "Write a Python function that returns the n-th Fibonacci number, and say what its running time is.",
    "Who wrote Romeo and Juliet?",
    "If a train goes 60 miles in an hour and a half, what is its average speed in miles per hour?",
    "Name the planets of the solar system in order.",
    "Is 91 a prime number?",
    "Give me a recipe for pancakes with at most five ingredients.",
    "What is the difference between a list and a tuple in Python?",
    "Solve for x: 3x - 7 = 20.",
    "Summarize the story of Little Red Riding Hood in two sentences.",
    "How many days are there in a leap year, and why does the year need one more day?",
    "Why is the sky blue?",
    "Sort these numbers from smallest to largest: 42, 7, 19, 3, 88, 64, 1.",
    "A rectangle is 8 cm long and its area is 40 square centimetres. What is its perimeter?",
)
