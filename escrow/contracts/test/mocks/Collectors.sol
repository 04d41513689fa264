// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";

import {IDepositCollector} from "../../src/IPaymentChannels.sol";

/// @notice Brings what an allowance permits, and one unit more or less when told to.
contract PlainCollector is IDepositCollector {
    int256 public off;

    function setOff(int256 off_) external {
        off = off_;
    }

    function collect(address payer, address token, uint256 amount, bytes32, bytes calldata) external {
        IERC20(token).transferFrom(payer, msg.sender, uint256(int256(amount) + off));
    }
}

/// @notice The same without asking what the token said.
contract SilentCollector is IDepositCollector {
    function collect(address payer, address token, uint256 amount, bytes32, bytes calldata) external {
        (bool done,) = token.call(abi.encodeCall(IERC20.transferFrom, (payer, msg.sender, amount)));
        require(done, "not moved");
    }
}
