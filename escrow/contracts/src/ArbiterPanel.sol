// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Clones} from "@openzeppelin/contracts/proxy/Clones.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";

import {Consent} from "./Consent.sol";
import {IArbiterPanel} from "./IArbiterPanel.sol";
import {IJobEscrow} from "./IJobEscrow.sol";

interface IEscrows {
    function isEscrow(address escrow) external view returns (bool);
}

/// @title The code that all panels share; each is a clone with its threshold and members behind it
/// @notice It takes no part in judging: it counts signatures and passes the ruling on.
contract ArbiterPanel is IArbiterPanel, ReentrancyGuardTransient {
    using SafeERC20 for IERC20;

    bytes32 public constant RULING_TYPEHASH =
        keccak256("Ruling(uint256 jobId,uint256 toSeller,uint256 penalty,bytes32 evidence)");

    address public immutable escrows;

    mapping(address token => mapping(address to => uint256 amount)) public owed;

    constructor(address escrows_) {
        escrows = escrows_;
    }

    function rule(
        address escrow,
        IJobEscrow.Terms calldata terms,
        uint256 toSeller,
        uint256 penalty,
        bytes32 evidence,
        bytes[] calldata sigs
    ) external nonReentrant {
        // Only of a real escrow it is known that a ruling pays the fee, or owes it.
        if (!IEscrows(escrows).isEscrow(escrow)) revert NotAnEscrow(escrow);
        uint256 jobId = IJobEscrow(escrow).jobId(terms);
        bytes32 structHash = keccak256(abi.encode(RULING_TYPEHASH, jobId, toSeller, penalty, evidence));
        (address[] memory signers, uint256 bits) = _signersOf(Consent.digestFor(escrow, structHash), sigs);
        emit PanelRuled(escrow, jobId, bits, terms.bond);

        // As the arbiter that the Terms name; if they name another, this is refused.
        IJobEscrow(escrow).rule(terms, toSeller, penalty, evidence, "");
        _share(terms.asset, terms.bond, signers);
    }

    function withdraw(address token, address to) external nonReentrant {
        uint256 amount = owed[token][to];
        if (amount == 0) revert NothingOwed(token, to);
        owed[token][to] = 0;
        emit Withdrawn(token, to, amount);
        IERC20(token).safeTransfer(to, amount);
    }

    function threshold() external view returns (uint256 needed) {
        (needed,) = _constitution();
    }

    function members() external view returns (address[] memory all) {
        (, all) = _constitution();
    }

    /// @dev Who signed, in the members' order, and the same as bits. Each member has one place, so
    /// nobody counts twice.
    function _signersOf(bytes32 digest, bytes[] calldata sigs)
        private
        view
        returns (address[] memory signers, uint256 bits)
    {
        (uint256 needed, address[] memory all) = _constitution();
        if (sigs.length != all.length) revert WrongCount(sigs.length, all.length);
        uint256 count = 0;
        for (uint256 i = 0; i < all.length; ++i) {
            if (all[i] != msg.sender) {
                if (sigs[i].length == 0) continue;
                if (!Consent.isBy(all[i], digest, sigs[i])) revert BadSignature(all[i]);
            }
            all[count++] = all[i];
            bits |= 1 << i;
        }
        if (count < needed) revert TooFew(count, needed);
        signers = new address[](count);
        for (uint256 i = 0; i < count; ++i) signers[i] = all[i];
    }

    /// @dev Equal parts, the dust to the first. One who cannot be paid must not hold the others' part.
    function _share(address token, uint256 fee, address[] memory signers) private {
        uint256 part = fee / signers.length;
        uint256 dust = fee % signers.length;
        for (uint256 i = 0; i < signers.length; ++i) {
            uint256 amount = i == 0 ? part + dust : part;
            if (amount == 0) continue;
            if (!IERC20(token).trySafeTransfer(signers[i], amount)) {
                owed[token][signers[i]] += amount;
                emit PaymentOwed(token, signers[i], amount);
            }
        }
    }

    /// @dev Stands behind the clone's code. The contract that the clones share has nothing there.
    function _constitution() private view returns (uint256 needed, address[] memory all) {
        return abi.decode(Clones.fetchCloneArgs(address(this)), (uint256, address[]));
    }
}
