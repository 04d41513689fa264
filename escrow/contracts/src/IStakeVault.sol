// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IJobEscrow} from "./IJobEscrow.sol";

/// @title Stakes of sellers: one slice for each deal, lost by a ruling or by the seller's own silence
/// @notice A seller deposits the token of this vault and allows escrows to reserve of it. A deal whose
/// Terms name this vault and a stake reserves its slice when it opens, and nobody may use that slice
/// for anything else until `close`, which anybody sends after the deal has ended. `close` reads how
/// it ended; the escrow never calls the vault on the way out, so neither can hold up the other.
///
/// | how the deal ended    | of the slice                                                         |
/// |-----------------------|----------------------------------------------------------------------|
/// | ruled                 | the ruling's penalty to the buyer, the rest is free                  |
/// | silent seller         | all to the buyer: it submitted, then did not answer the dispute      |
/// | undelivered, declined | all to the buyer with the seller's Ack while now <= deliverBy +      |
/// |                       | ACK_SECS; all free once now > that limit; nothing in between         |
/// | all else              | all free                                                             |
///
/// No owner, no pause, no upgrade. Signatures are those of the escrow's EIP-712 domain:
///   Ack(uint256 jobId,bytes32 input)     by the seller: "I have the input and can work"
interface IStakeVault {
    /// @notice What a seller has here is free, reserved or unbonding; these three are all of it.
    event Deposited(address indexed seller, uint256 amount);
    /// @notice An escrow may keep up to `maxReserved` of the seller's stake reserved at a time.
    event Allowed(address indexed seller, address indexed escrow, uint256 maxReserved);
    event Reserved(address indexed escrow, uint256 indexed jobId, address indexed seller, uint256 amount);
    /// @notice The slice of a deal is no more: `slashed` went to the buyer, `freed` to the free stake.
    event SliceClosed(
        address indexed escrow,
        uint256 indexed jobId,
        address indexed seller,
        IJobEscrow.How how,
        uint256 freed,
        uint256 slashed
    );
    /// @notice All that is unbonding now can be released at `unbondAt`.
    event Unbonding(address indexed seller, uint256 amount, uint256 unbondAt);
    event Released(address indexed seller, uint256 amount);
    /// @notice A payment did not go through and waits for `withdraw`.
    event PaymentOwed(address indexed to, uint256 amount);
    event Withdrawn(address indexed to, uint256 amount);

    /// @notice Token or factory has no code.
    error NotAContract(address account);
    /// @notice The amount is zero, or the seller's stake would not fit 128 bits.
    error BadAmount(uint256 amount);
    /// @notice The token moved another amount than was asked for.
    error WrongAmountReceived(uint256 expected, uint256 balanceBefore, uint256 balanceAfter);
    /// @notice The seller has not allowed this caller to reserve so much.
    error NotAllowedToReserve(address seller, address escrow, uint256 reserved, uint256 maxReserved, uint256 amount);
    /// @notice The seller's free stake is less than what was asked for.
    error NotEnoughFree(address seller, uint256 free, uint256 amount);
    /// @notice This job has its slice already.
    error AlreadyReserved(address escrow, uint256 jobId);
    /// @notice Nothing is reserved for this job, or not any more.
    error NothingReserved(address escrow, uint256 jobId);
    /// @notice The deal has not ended: `poke` ends it once its limit has passed.
    error DealIsOpen(uint256 jobId);
    /// @notice Until `limit` only the seller's Ack closes this slice; after it anybody does.
    error AckNeeded(uint256 jobId, uint256 limit);
    /// @notice Nothing is unbonding.
    error NothingToRelease(address seller);
    /// @notice Released can be from `unbondAt` on.
    error StillUnbonding(address seller, uint256 unbondAt);
    error NothingOwed(address to);

    /// @notice Adds to the caller's free stake, by allowance.
    function deposit(uint256 amount) external;

    /// @notice Lets the escrow of `token` keep up to `maxReserved` of the caller's stake reserved at a
    /// time, for deals that the caller signs. Zero, as at the beginning: nothing. What is reserved
    /// already stays.
    function allow(address token, uint256 maxReserved) external;

    /// @notice Reserves the slice of a deal. For escrows, inside `open`.
    function reserve(address seller, uint256 amount, uint256 jobId) external;

    /// @notice Ends the slice of a deal that has ended, by the table above. Anybody may call.
    /// @param input what the seller's Ack names; both are looked at only where the table says so
    function close(address escrow, IJobEscrow.Terms calldata terms, bytes32 input, bytes calldata ackSig) external;

    /// @notice Moves free stake of the caller to unbonding. The wait begins anew for all of it.
    function unbond(uint256 amount) external;

    /// @notice Pays the caller what is unbonding, from `unbondAt` on.
    function release() external;

    /// @notice Sends what is owed to `to`, to `to`. Anybody may call.
    function withdraw(address to) external;

    /// @notice A seller's stake: `free + reserved + unbonding` is all that it has bonded.
    function stakeOf(address seller)
        external
        view
        returns (uint256 free, uint256 reserved, uint256 unbonding, uint256 unbondAt);

    /// @notice What an escrow keeps reserved of a seller's stake, and how much it may.
    function allowanceOf(address seller, address escrow)
        external
        view
        returns (uint256 reserved, uint256 maxReserved);

    /// @notice What is reserved for a deal; zero before it opened and after its slice was closed.
    function sliceOf(address escrow, uint256 jobId) external view returns (uint256);

    /// @notice What a failed payment left here for `to`.
    function owed(address to) external view returns (uint256);

    function token() external view returns (address);

    /// @notice The factory whose escrows can be allowed.
    function factory() external view returns (address);
}
