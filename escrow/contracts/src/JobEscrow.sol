// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ERC8183Kernel} from "./ERC8183Kernel.sol";
import {OptimisticEvaluator} from "./OptimisticEvaluator.sol";

/// @title Escrow of one token: ERC-8183 jobs, and deals on top of them
/// @notice Kernel and evaluator in one deployment, since two would pay for every step twice.
contract JobEscrow is OptimisticEvaluator {
    constructor(address token_) ERC8183Kernel(token_) {}
}
