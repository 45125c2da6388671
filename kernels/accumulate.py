from fastvq.reference import accumulate as accumulate
