// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";

import {Consent} from "./Consent.sol";
import {IJobEscrow} from "./IJobEscrow.sol";
import {IStakeVault} from "./IStakeVault.sol";

interface IEscrowFactory {
    function escrowOf(address token) external view returns (address);
}

/// @title Stakes of sellers in one token, for the escrows of one factory
/// @notice See IStakeVault for the rules. A slice is taken only with the seller's signature under the
/// deal, and lost only by a ruling of the arbiter whom the seller signed, or by the seller's silence
/// after it submitted or acknowledged the input. A buyer who opens and vanishes, withholds the input
/// or plays both sides gets nothing.
contract StakeVault is IStakeVault, ReentrancyGuardTransient {
    using SafeERC20 for IERC20;

    bytes32 public constant ACK_TYPEHASH = keccak256("Ack(uint256 jobId,bytes32 input)");

    /// @notice How long after deliverBy the buyer may bring the seller's Ack.
    uint256 public constant ACK_SECS = 3 days;
    /// @notice How long stake waits between `unbond` and `release`. Longer than any window in which
    /// something may still be found out about it.
    uint256 public constant UNBOND_SECS = 7 days;

    /// @dev Two slots; `reserve` needs the first one only. The sum of the three never exceeds 128 bits.
    struct Stake {
        uint128 free;
        uint128 reserved;
        uint128 unbonding;
        uint40 unbondAt;
    }

    /// @dev One slot.
    struct Allowance {
        uint128 reserved;
        uint128 maxReserved;
    }

    address public immutable token;
    address public immutable factory;

    mapping(address to => uint256 amount) public owed;
    mapping(address escrow => mapping(uint256 jobId => uint256 amount)) public sliceOf;
    mapping(address seller => Stake) private _stakes;
    mapping(address seller => mapping(address escrow => Allowance)) private _allowances;

    constructor(address factory_, address token_) {
        if (token_.code.length == 0) revert NotAContract(token_);
        if (factory_.code.length == 0) revert NotAContract(factory_);
        (factory, token) = (factory_, token_);
    }

    // ------------------------------------------------------------------------------- the seller

    function deposit(uint256 amount) external nonReentrant {
        Stake storage stake = _stakes[msg.sender];
        uint256 bonded = uint256(stake.free) + stake.reserved + stake.unbonding;
        if (amount == 0 || amount > type(uint128).max - bonded) revert BadAmount(amount);
        stake.free += uint128(amount);
        emit Deposited(msg.sender, amount);

        uint256 balanceBefore = IERC20(token).balanceOf(address(this));
        IERC20(token).safeTransferFrom(msg.sender, address(this), amount);
        uint256 balanceAfter = IERC20(token).balanceOf(address(this));
        if (balanceAfter < balanceBefore || balanceAfter - balanceBefore != amount) {
            revert WrongAmountReceived(amount, balanceBefore, balanceAfter);
        }
    }

    function allow(address token_, uint256 maxReserved) external nonReentrant {
        if (maxReserved > type(uint128).max) revert BadAmount(maxReserved);
        // At that address there is, or will be, the factory's escrow of the token and nothing else.
        // So whoever has an allowance is an escrow, and `reserve` need not ask the factory again.
        address escrow = IEscrowFactory(factory).escrowOf(token_);
        _allowances[msg.sender][escrow].maxReserved = uint128(maxReserved);
        emit Allowed(msg.sender, escrow, maxReserved);
    }

    function unbond(uint256 amount) external nonReentrant {
        Stake storage stake = _stakes[msg.sender];
        if (amount == 0) revert BadAmount(amount);
        if (amount > stake.free) revert NotEnoughFree(msg.sender, stake.free, amount);
        uint256 unbondAt = block.timestamp + UNBOND_SECS;
        stake.free -= uint128(amount);
        stake.unbonding += uint128(amount);
        stake.unbondAt = uint40(unbondAt);
        emit Unbonding(msg.sender, amount, unbondAt);
    }

    function release() external nonReentrant {
        Stake storage stake = _stakes[msg.sender];
        uint256 amount = stake.unbonding;
        if (amount == 0) revert NothingToRelease(msg.sender);
        if (block.timestamp < stake.unbondAt) revert StillUnbonding(msg.sender, stake.unbondAt);
        stake.unbonding = 0;
        stake.unbondAt = 0;
        emit Released(msg.sender, amount);
        IERC20(token).safeTransfer(msg.sender, amount);
    }

    // --------------------------------------------------------------------------------- the deal

    function reserve(address seller, uint256 amount, uint256 jobId) external nonReentrant {
        Allowance storage allowance = _allowances[seller][msg.sender];
        (uint256 reserved, uint256 maxReserved) = (allowance.reserved, allowance.maxReserved);
        // A caller that is no escrow has no allowance. Written so that nothing overflows.
        if (amount == 0) revert BadAmount(amount);
        if (reserved > maxReserved || amount > maxReserved - reserved) {
            revert NotAllowedToReserve(seller, msg.sender, reserved, maxReserved, amount);
        }
        Stake storage stake = _stakes[seller];
        if (amount > stake.free) revert NotEnoughFree(seller, stake.free, amount);
        // An escrow opens each deal once, so this never happens: one slice must not hide another.
        if (sliceOf[msg.sender][jobId] != 0) revert AlreadyReserved(msg.sender, jobId);

        allowance.reserved += uint128(amount);
        stake.free -= uint128(amount);
        stake.reserved += uint128(amount);
        sliceOf[msg.sender][jobId] = amount;
        emit Reserved(msg.sender, jobId, seller, amount);
    }

    function close(address escrow, IJobEscrow.Terms calldata terms, bytes32 input, bytes calldata ackSig)
        external
        nonReentrant
    {
        // Only an escrow can have reserved, so one that has is honest. A false one may answer what
        // it likes: it has no slice.
        uint256 jobId = IJobEscrow(escrow).jobId(terms);
        uint256 amount = sliceOf[escrow][jobId];
        if (amount == 0) revert NothingReserved(escrow, jobId);
        (IJobEscrow.How how, uint256 penalty) = IJobEscrow(escrow).outcome(jobId);
        if (how == IJobEscrow.How.Open) revert DealIsOpen(jobId);

        uint256 slashed = 0;
        if (how == IJobEscrow.How.Ruled) {
            slashed = penalty; // The escrow took none above the stake.
        } else if (how == IJobEscrow.How.SilentSeller) {
            slashed = amount;
        } else if (how == IJobEscrow.How.Undelivered || how == IJobEscrow.How.Declined) {
            uint256 limit = terms.deliverBy + ACK_SECS;
            if (block.timestamp <= limit) {
                bytes32 structHash = keccak256(abi.encode(ACK_TYPEHASH, jobId, input));
                if (!Consent.isBy(terms.seller, Consent.digestFor(escrow, structHash), ackSig)) {
                    revert AckNeeded(jobId, limit);
                }
                slashed = amount;
            }
        }

        uint256 freed = amount - slashed;
        sliceOf[escrow][jobId] = 0;
        _allowances[terms.seller][escrow].reserved -= uint128(amount);
        Stake storage stake = _stakes[terms.seller];
        stake.reserved -= uint128(amount);
        stake.free += uint128(freed);
        emit SliceClosed(escrow, jobId, terms.seller, how, freed, slashed);
        _push(terms.buyer, slashed);
    }

    function withdraw(address to) external nonReentrant {
        uint256 amount = owed[to];
        if (amount == 0) revert NothingOwed(to);
        owed[to] = 0;
        emit Withdrawn(to, amount);
        IERC20(token).safeTransfer(to, amount);
    }

    // ------------------------------------------------------------------------------------ views

    function stakeOf(address seller)
        external
        view
        returns (uint256 free, uint256 reserved, uint256 unbonding, uint256 unbondAt)
    {
        Stake storage stake = _stakes[seller];
        return (stake.free, stake.reserved, stake.unbonding, stake.unbondAt);
    }

    function allowanceOf(address seller, address escrow)
        external
        view
        returns (uint256 reserved, uint256 maxReserved)
    {
        Allowance storage allowance = _allowances[seller][escrow];
        return (allowance.reserved, allowance.maxReserved);
    }

    /// @dev Pays, or notes the debt: a buyer who cannot be paid must not hold the seller's rest.
    function _push(address to, uint256 amount) private {
        if (amount == 0) return;
        if (!IERC20(token).trySafeTransfer(to, amount)) {
            owed[to] += amount;
            emit PaymentOwed(to, amount);
        }
    }
}
