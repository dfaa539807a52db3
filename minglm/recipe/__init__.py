"""GLM-4.5 as a list of stages: plan them, check them, train them, load and convert the result (paper Figure 3, 3.1).

stages           config -> the stages in order, each with its config, environments, seed and evaluation plan
inputs           the environments and the data that a config names are there
preflight        everything else that can be checked before anything is written
run              the folder of a run: which stages are complete, which comes next
context          what every stage shares: device, log, checkpoints, tokenizer, shards
training         one function for each kind of stage
conversations    what fine-tuning learns from: oracle's solutions, experts' answers
evaluation       what is measured after a stage
load, convert    a run or a released checkpoint, in and out
"""
