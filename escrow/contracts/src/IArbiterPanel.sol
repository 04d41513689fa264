// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IJobEscrow} from "./IJobEscrow.sol";

/// @title k of n arbiters as one arbiter
/// @notice A panel's address follows from its threshold and its members, so Terms can name it before
/// it exists, and nobody deploys it unless there is a dispute. `threshold` members sign one and the
/// same Ruling, in the escrow's EIP-712 domain; whoever holds their signatures brings them. Without so
/// many that agree in time the deal ends by `defaultToSeller`, and the panel earns nothing.
///
/// The arbiter's fee, one bond, is shared in equal parts by the members whose signatures were brought;
/// what does not divide goes to the first of them.
///   Ruling(uint256 jobId,uint256 toSeller,uint256 penalty,bytes32 evidence)
interface IArbiterPanel {
    /// @notice The panel ruled; bit i of `signers` stands for member i.
    event PanelRuled(address indexed escrow, uint256 indexed jobId, uint256 signers, uint256 fee);
    /// @notice A payment did not go through and waits for `withdraw`.
    event PaymentOwed(address indexed token, address indexed to, uint256 amount);
    event Withdrawn(address indexed token, address indexed to, uint256 amount);

    /// @notice No factory that this panel knows deployed it.
    error NotAnEscrow(address escrow);
    /// @notice One place for a signature per member is needed, empty for those who did not sign.
    error WrongCount(uint256 places, uint256 members);
    /// @notice The signature is not one of `member`.
    error BadSignature(address member);
    /// @notice Too few members signed this ruling.
    error TooFew(uint256 signers, uint256 threshold);
    error NothingOwed(address token, address to);

    /// @notice Rules as the arbiter of a deal. Anybody may call; a calling member counts as signed.
    /// @param sigs one for each member, in the members' order, empty where there is none
    function rule(
        address escrow,
        IJobEscrow.Terms calldata terms,
        uint256 toSeller,
        uint256 penalty,
        bytes32 evidence,
        bytes[] calldata sigs
    ) external;

    /// @notice Sends what is owed to `to`, to `to`. Anybody may call.
    /// @dev If the token once refused to pay the panel itself, the escrow owes it: `withdraw` there first.
    function withdraw(address token, address to) external;

    /// @notice What a failed payment left here for `to`.
    function owed(address token, address to) external view returns (uint256);

    function threshold() external view returns (uint256);

    /// @notice The members, by ascending address.
    function members() external view returns (address[] memory);

    /// @notice The factory whose escrows this panel rules in.
    function escrows() external view returns (address);
}
